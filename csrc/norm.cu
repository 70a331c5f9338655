// add_rms_norm and add_layer_norm: a row is read once and stays in registers.
//
// h is rounded, stored, and normalized as it is stored. Up to 1,024 channels a row belongs to one
// warp and its sums need no barrier; a wider one has a block. Unmeasured.

#include "device.h"
#include "launch.h"

namespace neobert {
namespace {

constexpr int WARP_ROWS = 4;      // rows, and warps, of a block where a row has a warp
constexpr int MOST_THREADS = 512;  // of a row

template <typename T, typename W, int PACKS, bool WARP, bool CENTERED>
__global__ void __launch_bounds__(WARP ? LANES * WARP_ROWS : MOST_THREADS) add_norm_kernel(
    const T* x, const T* residual, const W* weight, const W* bias, T* y, T* h, int64_t rows,
    int64_t x_stride, int64_t residual_stride, int width, float eps) {
  const int team = WARP ? LANES : blockDim.x, lane = threadIdx.x;
  const int64_t row = WARP ? int64_t(blockIdx.x) * WARP_ROWS + threadIdx.y : blockIdx.x;
  if (row >= rows) return;  // all of a team
  const auto total = [](float value) { return WARP ? warp_sum(value) : block_sum(value); };
  x += row * x_stride;
  residual += row * residual_stride;
  y += row * width;
  h += row * width;

  // Lanes past the end read the row's start, and drop it: no branch, so all loads are on their way.
  Raw<T> left[PACKS], right[PACKS];
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    const int column = (j * team + lane) * PACK, from = column < width ? column : 0;
    left[j] = fetch(x + from);
    right[j] = fetch(residual + from);
  }
  Pack packs[PACKS];
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    const int column = (j * team + lane) * PACK;
    const Pack a = left[j].pack(), b = right[j].pack();
    Pack added;
#pragma unroll
    for (int i = 0; i < PACK; ++i) added.v[i] = a.v[i] + b.v[i];
    packs[j] = {};
    if (column < width) packs[j] = store(h + column, added);
#pragma unroll
    for (int i = 0; i < PACK; ++i) sum += packs[j].v[i];
  }
  Raw<W> weights[PACKS], shifts[PACKS];
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    const int column = (j * team + lane) * PACK, from = column < width ? column : 0;
    weights[j] = fetch(weight + from);
    if (CENTERED && bias != nullptr) shifts[j] = fetch(bias + from);
  }
  if (CENTERED) {
    const float mean = total(sum) / width;
#pragma unroll
    for (int j = 0; j < PACKS; ++j) {
      const bool inside = (j * team + lane) * PACK < width;
#pragma unroll
      for (int i = 0; i < PACK; ++i) packs[j].v[i] = inside ? packs[j].v[i] - mean : 0.0f;
    }
  }
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
#pragma unroll
    for (int i = 0; i < PACK; ++i) squares += packs[j].v[i] * packs[j].v[i];
  }
  const float scale = rsqrtf(total(squares) / width + eps);
#pragma unroll
  for (int j = 0; j < PACKS; ++j) {
    const int column = (j * team + lane) * PACK;
    const Pack w = weights[j].pack();
#pragma unroll
    for (int i = 0; i < PACK; ++i) packs[j].v[i] = w.v[i] * (packs[j].v[i] * scale);
    if (CENTERED && bias != nullptr) {
      const Pack b = shifts[j].pack();
#pragma unroll
      for (int i = 0; i < PACK; ++i) packs[j].v[i] += b.v[i];
    }
    if (column < width) store(y + column, packs[j]);
  }
}

template <typename T, typename W, int PACKS, bool WARP, bool CENTERED>
int run(const Norm& work, int threads, void* stream) {
  const dim3 grid(WARP ? (work.rows + WARP_ROWS - 1) / WARP_ROWS : work.rows);
  const dim3 block(WARP ? LANES : threads, WARP ? WARP_ROWS : 1);
  return NEOBERT_LAUNCH(
      (add_norm_kernel<T, W, PACKS, WARP, CENTERED>), grid, block, stream,
      static_cast<const T*>(work.x), static_cast<const T*>(work.residual),
      static_cast<const W*>(work.weight), static_cast<const W*>(work.bias),
      static_cast<T*>(work.y), static_cast<T*>(work.h), work.rows, work.x_stride,
      work.residual_stride, work.width, work.eps);
}

template <typename T, typename W, bool CENTERED>
int choose(const Norm& work, void* stream) {
  const int packs = work.width / PACK;
  switch ((packs + LANES - 1) / LANES) {
    case 1:
    case 2: return run<T, W, 2, true, CENTERED>(work, LANES, stream);
    case 3: return run<T, W, 3, true, CENTERED>(work, LANES, stream);
    case 4: return run<T, W, 4, true, CENTERED>(work, LANES, stream);
  }
  if (packs <= MOST_THREADS) return run<T, W, 1, false, CENTERED>(work, whole_warps(packs), stream);
  return run<T, W, 4, false, CENTERED>(work, MOST_THREADS, stream);
}

template <typename T>
int choose(const Norm& work, void* stream) {
  if (work.weight_type == Type::float32) {
    return work.centered ? choose<T, float, true>(work, stream)
                         : choose<T, float, false>(work, stream);
  }
  return work.centered ? choose<T, T, true>(work, stream) : choose<T, T, false>(work, stream);
}

}  // namespace

int launch(const Norm& work, void* stream) {
  switch (work.type) {
    case Type::float32: return choose<float>(work, stream);
    case Type::float16: return choose<Half>(work, stream);
    case Type::bfloat16: return choose<BFloat>(work, stream);
  }
  return 1;
}

}  // namespace neobert
