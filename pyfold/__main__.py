from pyfold.cli import main

raise SystemExit(main())
