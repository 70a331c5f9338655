// What kernels are written in: CUDA under nvcc, its stand-in on_host.h under any other compiler.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define NEOBERT_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel<<<(grid), (block), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaPeekAtLastError()))
#else
#include "on_host.h"
#endif

namespace neobert {

constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffffu;

// 16-bit floats as they are stored; arithmetic is float32.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// Eight neighbouring channels, the unit of every access: 16 bytes of 16-bit floats, twice 16 of float32.
constexpr int PACK = 8;
struct Pack {
  float v[PACK];
};

#ifdef __CUDACC__

__device__ inline float2 widen(uint32_t pair, Half) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}

__device__ inline float2 widen(uint32_t pair, BFloat) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ inline uint32_t narrow(float low, float high, Half) {
  __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ inline uint32_t narrow(float low, float high, BFloat) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&pair);
}

#else

inline float2 widen(uint32_t pair, Half) {
  _Float16 two[2];
  std::memcpy(two, &pair, sizeof pair);
  return {static_cast<float>(two[0]), static_cast<float>(two[1])};
}

inline float2 widen(uint32_t pair, BFloat) {
  const uint32_t words[2] = {pair << 16, pair & 0xffff0000u};
  float2 two;
  std::memcpy(&two, words, sizeof two);
  return two;
}

inline uint32_t narrow(float low, float high, Half) {
  const _Float16 two[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t pair;
  std::memcpy(&pair, two, sizeof pair);
  return pair;
}

inline uint32_t narrow(float low, float high, BFloat) {
  const auto rounded = [](float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x == x ? (bits + 0x7fffu + (bits >> 16 & 1)) >> 16 : 0x7fffu;
  };
  return rounded(low) | rounded(high) << 16;
}

#endif

template <typename T>
__device__ inline Pack unpack(const uint4& raw) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  Pack pack;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = widen(words[i], T{});
    pack.v[2 * i] = pair.x;
    pack.v[2 * i + 1] = pair.y;
  }
  return pack;
}

// As loaded, without a conversion that would wait for it: so that several loads are on their way.
template <typename T>
struct Raw {
  uint4 words;
  __device__ Pack pack() const { return unpack<T>(words); }
};

template <>
struct Raw<float> {
  float4 low, high;
  __device__ Pack pack() const {
    return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
  }
};

template <typename T>
__device__ inline Raw<T> fetch(const T* at) {
  return *reinterpret_cast<const Raw<T>*>(at);
}

template <typename T>
__device__ inline Pack load(const T* at) {
  return fetch(at).pack();
}

// The only place where anything is rounded: to the nearest, ties to even. Returns what was stored.
template <typename T>
__device__ inline Pack store(T* at, const Pack& pack) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = narrow(pack.v[2 * i], pack.v[2 * i + 1], T{});
  const uint4 raw{words[0], words[1], words[2], words[3]};
  *reinterpret_cast<uint4*>(at) = raw;
  return unpack<T>(raw);
}

template <>
__device__ inline Pack store<float>(float* at, const Pack& pack) {
  const float* v = pack.v;
  reinterpret_cast<float4*>(at)[0] = float4{v[0], v[1], v[2], v[3]};
  reinterpret_cast<float4*>(at)[1] = float4{v[4], v[5], v[6], v[7]};
  return pack;
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int mask = LANES / 2; mask; mask /= 2) value += __shfl_xor_sync(ALL, value, mask);
  return value;
}

// The sum over a block of whole warps, to every thread: over lanes, then over warps in order.
__device__ inline float block_sum(float value) {
  __shared__ float of_warp[LANES];
  value = warp_sum(value);
  if (threadIdx.x % LANES == 0) of_warp[threadIdx.x / LANES] = value;
  __syncthreads();
  float total = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / LANES; ++warp) total += of_warp[warp];
  __syncthreads();
  return total;
}

inline int whole_warps(int threads) { return (threads + LANES - 1) / LANES * LANES; }

}  // namespace neobert
