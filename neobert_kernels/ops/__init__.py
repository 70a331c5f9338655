"""One operator, one module: mathematics, reference, kernels, registration, public function."""
