// Error texts, and whether this binary can run on the GPU at hand.

#include "device.h"
#include "launch.h"

namespace neobert {

#ifdef __CUDACC__

namespace {
__global__ void empty_kernel() {}
}  // namespace

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

const char* refused() {
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, empty_kernel);
  cudaGetLastError();
  return code == cudaSuccess ? nullptr : cudaGetErrorString(code);
}

#else

const char* error_text(int) { return "no launch fails on a CPU"; }

const char* refused() { return nullptr; }

#endif

}  // namespace neobert
