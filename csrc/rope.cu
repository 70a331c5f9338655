// rope: a block turns all heads of one token, a thread eight pairs of one head.
//
// A thread reads all it writes before it writes, so y may be x.

#include "device.h"
#include "launch.h"

namespace neobert {
namespace {

constexpr int MOST_THREADS = 256;

template <typename T>
struct View {
  const T* x;
  T* y;
  int heads;
  int64_t x_stride_t, x_stride_h, y_stride_t, y_stride_h;
};

template <typename T, bool INTERLEAVED, bool OUT_INTERLEAVED>
__global__ void __launch_bounds__(MOST_THREADS)
    rope_kernel(View<T> first, View<T> second, const float* cos, const float* sin, int dim, bool inverse) {
  const int64_t token = blockIdx.x;
  const int half = dim / 2, packs = half / PACK;
  const int items = (first.heads + second.heads) * packs;
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const int pair = item % packs * PACK;
    int head = item / packs;
    const View<T>& view = head < first.heads ? first : second;
    if (head >= first.heads) head -= first.heads;
    const T* x = view.x + token * view.x_stride_t + head * view.x_stride_h;
    T* y = view.y + token * view.y_stride_t + head * view.y_stride_h;

    Pack a = load(x + (INTERLEAVED ? 2 * pair : pair));
    Pack b = load(x + (INTERLEAVED ? 2 * pair + PACK : half + pair));
    if (INTERLEAVED) {
      const Pack low = a, high = b;
#pragma unroll
      for (int i = 0; i < PACK; ++i) {
        const Pack& from = i < PACK / 2 ? low : high;
        a.v[i] = from.v[2 * i % PACK];
        b.v[i] = from.v[2 * i % PACK + 1];
      }
    }
    const Pack c = load(cos + token * half + pair), s = load(sin + token * half + pair);
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
      const float turn = inverse ? -s.v[i] : s.v[i], left = a.v[i], right = b.v[i];
      // Fused here, or the compiler may fuse another product in every layout.
      a.v[i] = fmaf(left, c.v[i], -(right * turn));
      b.v[i] = fmaf(left, turn, right * c.v[i]);
    }
    if (OUT_INTERLEAVED) {
      Pack low, high;
#pragma unroll
      for (int i = 0; i < PACK; ++i) {
        low.v[i] = (i % 2 ? b : a).v[i / 2];
        high.v[i] = (i % 2 ? b : a).v[PACK / 2 + i / 2];
      }
      store(y + 2 * pair, low);
      store(y + 2 * pair + PACK, high);
    } else {
      store(y + pair, a);
      store(y + half + pair, b);
    }
  }
}

template <typename T>
View<T> view(const Heads& heads) {
  return {static_cast<const T*>(heads.x), static_cast<T*>(heads.y), heads.heads, heads.x_stride_t,
          heads.x_stride_h, heads.y_stride_t, heads.y_stride_h};
}

template <typename T, bool INTERLEAVED, bool OUT_INTERLEAVED>
int run(const Rope& work, void* stream) {
  const int items = (work.first.heads + work.second.heads) * (work.dim / 2 / PACK);
  const dim3 grid(work.tokens), block(items < MOST_THREADS ? whole_warps(items) : MOST_THREADS);
  return NEOBERT_LAUNCH((rope_kernel<T, INTERLEAVED, OUT_INTERLEAVED>), grid, block, stream,
                        view<T>(work.first), view<T>(work.second), work.cos, work.sin, work.dim,
                        work.inverse);
}

template <typename T>
int choose(const Rope& work, void* stream) {
  if (!work.interleaved) return run<T, false, false>(work, stream);
  return work.out_interleaved ? run<T, true, true>(work, stream)
                              : run<T, true, false>(work, stream);
}

}  // namespace

int launch(const Rope& work, void* stream) {
  switch (work.type) {
    case Type::float32: return choose<float>(work, stream);
    case Type::float16: return choose<Half>(work, stream);
    case Type::bfloat16: return choose<BFloat>(work, stream);
  }
  return 1;
}

}  // namespace neobert
