// The kernels as the operators see them: no PyTorch here, and no CUDA.
#pragma once

#include <cstdint>

namespace neobert {

enum class Type { float32, float16, bfloat16 };

// Each returns the error code of its launch, 0 for none. Pointers and rows are 16-byte aligned,
// widths are multiples of 8 channels, strides count elements.

struct Norm {  // h = x + residual; y = norm(h) * weight + bias, centred for layer_norm
  const void *x, *residual, *weight, *bias;
  void *y, *h;
  int64_t rows, x_stride, residual_stride;
  int width;
  float eps;
  bool centered;
  Type type, weight_type;  // weight_type is type, or float32
};
int launch(const Norm& work, void* stream);

struct Gated {  // y = act(x[:, :width]) * x[:, width:]
  const void* x;
  void* y;
  int64_t rows, x_stride;
  int width;
  bool gelu;
  Type type;
};
int launch(const Gated& work, void* stream);

struct Heads {  // [T, heads, D]
  const void* x;
  void* y;
  int heads;
  int64_t x_stride_t, x_stride_h, y_stride_t, y_stride_h;
};

struct Rope {  // two sets of heads, the second of which may have none
  Heads first, second;
  const float *cos, *sin;  // [T, dim / 2]
  int64_t tokens;
  int dim;
  bool interleaved, out_interleaved, inverse;
  Type type;
};
int launch(const Rope& work, void* stream);

struct Pool {  // the mean of every document; y is [documents, width]
  const void* x;
  const int32_t* cu_seqlens;
  void* y;
  float *unit, *norm;  // of normalized results: unrounded (where y is rounded), and lengths
  float* sums;         // room for scratch_rows(work) rows, or null where that is 0
  int64_t tokens, x_stride;
  int documents, width;
  bool normalize;
  Type type;
};
int64_t scratch_rows(const Pool& work);
int launch(const Pool& work, void* stream);

const char* error_text(int code);
// Why this binary cannot run on the current GPU, or null.
const char* refused();

}  // namespace neobert
