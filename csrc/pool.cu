// mean_pool: a document is cut into parts of 128 tokens from its own start, and the parts are added
// in order, so its bits depend neither on the other documents nor on which kernels add them.
//
// Few tokens are one launch: a block adds all parts of a document. Many are two, so that a long
// document is the work of many blocks. A norm needs whole rows, and so a launch of its own.

#include "device.h"
#include "launch.h"

namespace neobert {
namespace {

constexpr int PART = 128;
constexpr int WARPS = 8;                 // of a block: warp w adds tokens w, w + 8, ... of a part
constexpr int COLUMNS = LANES * PACK;    // of a block
constexpr int64_t FEW_TOKENS = 4096;     // that one launch adds; unmeasured

// The sum of tokens start ... end of one part and of the block's columns: column threadIdx.x of them.
template <typename T>
__device__ float part_sum(const T* x, int64_t stride, int start, int end, int width) {
  alignas(16) __shared__ float of_warp[WARPS][COLUMNS];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int column = blockIdx.y * COLUMNS + lane * PACK;
  Pack sum = {};
  if (column < width) {
#pragma unroll 4
    for (int token = start + warp; token < end; token += WARPS) {
      const Pack row = load(x + token * stride + column);
#pragma unroll
      for (int i = 0; i < PACK; ++i) sum.v[i] += row.v[i];
    }
  }
  store(&of_warp[warp][lane * PACK], sum);
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += of_warp[w][threadIdx.x];
  __syncthreads();
  return total;
}

// Column threadIdx.x of every thread, to memory in packs.
template <typename T>
__device__ void store_columns(T* row, float value, int width) {
  alignas(16) __shared__ float values[COLUMNS];
  values[threadIdx.x] = value;
  __syncthreads();
  const int column = blockIdx.y * COLUMNS + threadIdx.x * PACK;
  if (threadIdx.x < LANES && column < width) store(row + column, load(&values[threadIdx.x * PACK]));
}

// Block (b, j): the mean of document b.
template <typename T, typename Y>
__global__ void __launch_bounds__(COLUMNS)
    mean_kernel(const T* x, const int32_t* cu_seqlens, Y* y, int64_t stride, int width) {
  const int begin = cu_seqlens[blockIdx.x], end = cu_seqlens[blockIdx.x + 1];
  float total = 0.0f;
  for (int start = begin; start < end; start += PART) {
    total += part_sum(x, stride, start, min(end, start + PART), width);
  }
  store_columns(y + int64_t(blockIdx.x) * width, total / max(end - begin, 1), width);
}

// Block (n, j): the sum of part n. Part p of document b is number cu_seqlens[b] / PART + b + p,
// below tokens / PART + documents: no prefix sum, no synchronization.
template <typename T>
__global__ void __launch_bounds__(COLUMNS)
    part_kernel(const T* x, const int32_t* cu_seqlens, float* sums, int documents, int64_t stride,
                int width) {
  const int number = blockIdx.x;
  int low = 0, high = documents;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (cu_seqlens[middle] / PART + middle <= number ? low : high) = middle;
  }
  const int begin = cu_seqlens[low], end = cu_seqlens[low + 1];
  const int start = begin + (number - begin / PART - low) * PART;
  if (start >= end) return;  // all of a block
  const float sum = part_sum(x, stride, start, min(end, start + PART), width);
  store_columns(sums + int64_t(number) * width, sum, width);
}

// Block b: the mean of document b from its parts (or, ADDED, from what is one already), normalized.
template <typename Y, bool ADDED>
__global__ void __launch_bounds__(COLUMNS)
    finish_kernel(const float* sums, const int32_t* cu_seqlens, Y* y, float* unit, float* norm,
                  int width) {
  const int document = blockIdx.x;
  const int begin = cu_seqlens[document], length = cu_seqlens[document + 1] - begin;
  const int count = ADDED ? 1 : (length + PART - 1) / PART;
  const int divisor = ADDED ? 1 : max(length, 1);
  sums += int64_t(ADDED ? document : begin / PART + document) * width;
  const auto mean = [&](int column) {
    Pack total = {};
    for (int part = 0; part < count; ++part) {
      const Pack sum = load(sums + int64_t(part) * width + column);
#pragma unroll
      for (int i = 0; i < PACK; ++i) total.v[i] += sum.v[i];
    }
#pragma unroll
    for (int i = 0; i < PACK; ++i) total.v[i] /= divisor;
    return total;
  };
  float length_of_mean = 1.0f;
  if (norm != nullptr) {
    float squares = 0.0f;
    for (int column = threadIdx.x * PACK; column < width; column += COLUMNS * PACK) {
      const Pack m = mean(column);
#pragma unroll
      for (int i = 0; i < PACK; ++i) squares += m.v[i] * m.v[i];
    }
    length_of_mean = sqrtf(block_sum(squares));
    if (threadIdx.x == 0) norm[document] = length_of_mean;
    length_of_mean = fmaxf(length_of_mean, 1e-12f);
  }
  const int64_t row = int64_t(document) * width;
  for (int column = threadIdx.x * PACK; column < width; column += COLUMNS * PACK) {
    Pack m = mean(column);
    if (norm != nullptr) {
#pragma unroll
      for (int i = 0; i < PACK; ++i) m.v[i] /= length_of_mean;
    }
    if (unit != nullptr) store(unit + row + column, m);
    store(y + row + column, m);
  }
}

template <typename T>
int choose(const Pool& work, void* stream) {
  const T* x = static_cast<const T*>(work.x);
  T* y = static_cast<T*>(work.y);
  const unsigned chunks = (work.width + COLUMNS - 1) / COLUMNS;
  const dim3 block(COLUMNS), documents(work.documents, chunks);
  const bool few = work.tokens <= FEW_TOKENS;
  int code;
  if (few && !work.normalize) {
    return NEOBERT_LAUNCH((mean_kernel<T, T>), documents, block, stream, x, work.cu_seqlens, y,
                          work.x_stride, work.width);
  }
  if (few) {
    code = NEOBERT_LAUNCH((mean_kernel<T, float>), documents, block, stream, x, work.cu_seqlens,
                          work.sums, work.x_stride, work.width);
  } else {
    code = NEOBERT_LAUNCH((part_kernel<T>), dim3(scratch_rows(work), chunks), block, stream, x,
                          work.cu_seqlens, work.sums, work.documents, work.x_stride, work.width);
  }
  if (code) return code;
  const dim3 each(work.documents);
  return few ? NEOBERT_LAUNCH((finish_kernel<T, true>), each, block, stream, work.sums,
                              work.cu_seqlens, y, work.unit, work.norm, work.width)
             : NEOBERT_LAUNCH((finish_kernel<T, false>), each, block, stream, work.sums,
                              work.cu_seqlens, y, work.unit, work.norm, work.width);
}

}  // namespace

int64_t scratch_rows(const Pool& work) {
  if (work.tokens > FEW_TOKENS) return work.tokens / PART + work.documents;
  return work.normalize ? work.documents : 0;
}

int launch(const Pool& work, void* stream) {
  switch (work.type) {
    case Type::float32: return choose<float>(work, stream);
    case Type::float16: return choose<Half>(work, stream);
    case Type::bfloat16: return choose<BFloat>(work, stream);
  }
  return 1;
}

}  // namespace neobert
