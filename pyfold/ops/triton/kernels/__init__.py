"""The Triton kernels, one op a file: kernel, launcher, public function. Importing one imports triton."""
