// swiglu and geglu: y = act(g) * b of one projection [g, b]; a thread has eight channels of both.

#include "device.h"
#include "launch.h"

namespace neobert {
namespace {

constexpr int MOST_THREADS = 256;
constexpr int64_t MOST_ROWS = 65535;  // of a grid; more rows are a loop

// Without the 4 the assembler saves registers, and loads b when the gate is activated.
template <typename T, bool GELU>
__global__ void __launch_bounds__(MOST_THREADS, 4)
    gated_kernel(const T* x, T* y, int64_t rows, int64_t x_stride, int width) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * PACK;
  if (column >= width) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const T* gate = x + row * x_stride + column;
    const Pack g = load(gate), b = load(gate + width);
    Pack result;
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
      const float p = GELU ? 0.5f + 0.5f * erff(g.v[i] * 0.7071067811865476f)
                           : __fdividef(1.0f, 1.0f + expf(-g.v[i]));
      result.v[i] = g.v[i] * p * b.v[i];
    }
    store(y + row * width + column, result);
  }
}

template <typename T>
int choose(const Gated& work, void* stream) {
  const int packs = work.width / PACK;
  const int threads = packs < MOST_THREADS ? whole_warps(packs) : MOST_THREADS;
  const dim3 grid((packs + threads - 1) / threads, work.rows < MOST_ROWS ? work.rows : MOST_ROWS);
  const T* x = static_cast<const T*>(work.x);
  T* y = static_cast<T*>(work.y);
  return work.gelu ? NEOBERT_LAUNCH((gated_kernel<T, true>), grid, dim3(threads), stream, x, y,
                                    work.rows, work.x_stride, work.width)
                   : NEOBERT_LAUNCH((gated_kernel<T, false>), grid, dim3(threads), stream, x, y,
                                    work.rows, work.x_stride, work.width);
}

}  // namespace

int launch(const Gated& work, void* stream) {
  switch (work.type) {
    case Type::float32: return choose<float>(work, stream);
    case Type::float16: return choose<Half>(work, stream);
    case Type::bfloat16: return choose<BFloat>(work, stream);
  }
  return 1;
}

}  // namespace neobert
