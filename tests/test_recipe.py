"""Recipes: the same fold as by flags, and one line, with its number, for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import run_cli, tiny_checkpoint, tree

from pyfold import fold_checkpoint
from pyfold.errors import PyfoldError
from pyfold.recipe import read_recipe, recipe_text


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("recipe") / "tiny", n_layers=4)


def test_the_same_bytes_as_by_flags(source: Path, tmp_path: Path) -> None:
    flags = ["--ratio", 0.3, "--layers", "1-2", "--repair", "variance", "--seed", 5, "--dtype", "bfloat16"]
    printed = run_cli("fold", source, tmp_path / "a", *flags, "--print-recipe")
    assert printed.returncode == 0, printed.stderr
    assert not (tmp_path / "a").exists()
    assert {"ratio": 0.3, "layers": "1-2", "repair": "variance", "seed": 5}.items() <= yaml.safe_load(printed.stdout).items()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(printed.stdout)
    for folder, options in (("a", flags), ("b", ["--recipe", recipe])):
        done = run_cli("fold", source, tmp_path / folder, *options, "--quiet")
        assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    again = run_cli("fold", source, tmp_path / "c", "--recipe", recipe, "--print-recipe")
    assert again.stdout == printed.stdout


def test_ratios_by_layers(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ratio:\n  0: 0.5\n  2-3: 0.25  # of 48\nprofile: per-layer\n")
    done = run_cli("fold", source, tmp_path / "a", "--recipe", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert [(each["name"], each["folded_width"]) for each in json.loads(done.stdout)["groups"]] == [
        *[("layers.0.mlp", 24), ("layers.2.mlp", 36), ("layers.3.mlp", 36)]
    ]
    fold_checkpoint(source, tmp_path / "b", ratio={"0": 0.5, "2,3": 0.25})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    planned = run_cli("plan", source, "--recipe", recipe)
    assert planned.returncode == 0, planned.stderr
    assert "24" in planned.stdout
    less = run_cli("fold", source, tmp_path / "c", "--recipe", recipe, "--width", 40, "--layers", "1", "--json")
    assert [each["folded_width"] for each in json.loads(less.stdout)["groups"]] == [40]
    for options, message in [
        ({"ratio": {"0-1": 0.5, "1": 0.2}}, "ratio: layer 1 is there twice, the second time in '1'"),
        ({"ratio": {"9": 0.5}}, "there is no layer 9"),
        ({"ratio": {"1": 0.5}, "layers": "1"}, "layers: a ratio by layers says which already"),
        ({"ratio": {"1": 1.0}}, "ratio: expected a number in"),
        ({"ratio": {}}, "ratio: expected a number, or numbers by layers"),
    ]:
        with pytest.raises(PyfoldError, match=message):
            fold_checkpoint(source, tmp_path / "d", **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: 0.2\nrepairs: none\n", ":2: no such option 'repairs'; a recipe may have ratio, width"),
        ("metric: function\n\nratio: 1.5\n", ":3: ratio: expected a number from 0 to less than 1, or such numbers by layers"),
        ("ratio:\n  0-2: much\n", ":1: ratio: expected a number"),
        ("ratio:\n  3: 0.1\n  3: 0.2\n", ":3: 3 is there twice"),
        ("ratio: 0.1\nratio: 0.2\n", ":2: ratio is there twice"),
        ("profile: flat\n", ":1: profile: expected one of per-layer, stock, got 'flat'"),
        ("seed: -1\n", ":1: seed: expected an integer from 0, got '-1'"),
        ("multiple_of: true\n", ":1: multiple_of: expected a positive integer"),
        ("ratio: [0.1\nseed: 3\n", ":2: not YAML: "),
        ("- ratio\n", ":1: expected options, as in 'ratio: 0.2'"),
        ("", ":1: expected options"),
        ("ratio: 0.1\nwidth: 8\n", ": give one of ratio, width"),
        ("ratio: !!python/object:os.system {}\n", ":1: "),
        ("ratio: &a [*a]\n", ":1: "),
    ],
)
def test_what_is_wrong_and_where(text: str, message: str, source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    done = run_cli("fold", source, tmp_path / "out", "--recipe", recipe)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"pyfold: {recipe}{message}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_files_and_flags(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert run_cli("fold", source, tmp_path / "out", "--recipe", recipe).stderr == (
        f"pyfold: {recipe}: cannot read the recipe: No such file or directory\n"
    )
    done = run_cli("fold", source, tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "give --ratio, --width, --target-params, --target-bytes, or --recipe" in done.stderr
    recipe.write_text("ratio: {1: 0.2}\n")
    done = run_cli("fold", source, tmp_path / "out", "--recipe", recipe, "--width", 20)
    assert "its ratio says which layers; with another width, name them by --layers" in done.stderr
    assert read_recipe(recipe) == {"ratio": {"1": 0.2}}
    assert yaml.safe_load(recipe_text({"ratio": {"1": 0.2}, "progress": None, "seed": 0})) == {"ratio": {"1": 0.2}, "seed": 0}
