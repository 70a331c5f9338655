// The operators that Python defines, for the inputs that the kernels take; the rest goes to Triton.
//
// PyTorch's stable ABI only, as of 2.11: one binary for that version and all later ones. An
// operator looks at its arguments where they lie, and either takes them or hands the whole stack,
// untouched, to the operator <name>_triton.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>

#include "launch.h"

#ifndef NEOBERT_NAMESPACE
#define NEOBERT_NAMESPACE neobert
#define NEOBERT_KEY CUDA
#endif

#define NEOBERT_TEXT(x) NEOBERT_TEXT_OF(x)
#define NEOBERT_TEXT_OF(x) #x

namespace neobert {
namespace {

using torch::stable::detail::to;

constexpr int MOST_CHANNELS = 16384;
constexpr int ALIGNED = 16;  // bytes

// Bits that Python sets, in the order of cuda.OPERATORS there.
enum Chosen : uint32_t {
  ADD_RMS_NORM = 1,
  ADD_LAYER_NORM = 2,
  ROPE = 4,
  SWIGLU = 8,
  GEGLU = 16,
  MEAN_POOL = 32
};
std::atomic<uint32_t> chosen{0};
std::atomic<uint64_t> taken{0};  // calls that were not handed on

bool use(uint32_t operators) { return chosen.load(std::memory_order_relaxed) & operators; }

// Headers of 2.11 and of later versions name the macro for this differently.
void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("neobert: a call of libtorch failed");
}

// A tensor that the stack, or one of our owners below, owns.
struct Tensor {
  AtenTensorHandle handle = nullptr;
  const int64_t *sizes = nullptr, *strides = nullptr;
  int64_t dims = 0;
  char* data = nullptr;
  int32_t dtype = 0;

  Tensor() = default;
  explicit Tensor(AtenTensorHandle handle) : handle(handle) {
    int64_t *found_sizes, *found_strides;
    void* found_data;
    check(aoti_torch_get_dim(handle, &dims));
    check(aoti_torch_get_sizes(handle, &found_sizes));
    check(aoti_torch_get_strides(handle, &found_strides));
    check(aoti_torch_get_data_ptr(handle, &found_data));
    check(aoti_torch_get_dtype(handle, &dtype));
    sizes = found_sizes;
    strides = found_strides;
    data = static_cast<char*>(found_data);
  }
  explicit Tensor(StableIValue value) : Tensor(to<AtenTensorHandle>(value)) {}

  int64_t size(int64_t dim) const { return sizes[dim]; }
  int64_t stride(int64_t dim) const { return strides[dim]; }
  int64_t last() const { return sizes[dims - 1]; }
  int64_t rows() const {
    int64_t count = 1;
    for (int64_t i = 0; i + 1 < dims; ++i) count *= sizes[i];
    return count;
  }
  int bytes() const { return dtype == aoti_torch_dtype_float32() ? 4 : 2; }
  bool contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dims; i-- > 0; expected *= sizes[i]) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
    }
    return true;
  }
  bool aligned() const { return reinterpret_cast<uintptr_t>(data) % ALIGNED == 0; }
  bool aligned(int64_t stride) const { return stride * bytes() % ALIGNED == 0; }

  std::optional<Type> type() const {
    static const int32_t full = aoti_torch_dtype_float32(), half = aoti_torch_dtype_float16(),
                         brain = aoti_torch_dtype_bfloat16();
    if (dtype == full) return Type::float32;
    if (dtype == half) return Type::float16;
    if (dtype == brain) return Type::bfloat16;
    return std::nullopt;
  }

  // Elements between rows of channels, where there is one such number and all rows are aligned.
  std::optional<int64_t> row_stride() const {
    if (!type() || dims < 1 || !aligned()) return std::nullopt;
    int64_t stride = last();
    if (!contiguous()) {
      if (dims != 2 || strides[1] != 1) return std::nullopt;
      stride = strides[0];
    }
    return aligned(stride) ? std::optional(stride) : std::nullopt;
  }
};

struct Owned {
  AtenTensorHandle handle = nullptr;
  Owned() = default;
  explicit Owned(AtenTensorHandle handle) : handle(handle) {}
  Owned(Owned&& other) noexcept : handle(other.give()) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle, other.handle);
    return *this;
  }
  ~Owned() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
  AtenTensorHandle give() {
    AtenTensorHandle given = handle;
    handle = nullptr;
    return given;
  }
};

StableIValue give(Owned& tensor) { return torch::stable::detail::from(tensor.give()); }

Owned empty(const Tensor& like, const int64_t* sizes, int64_t dims, int32_t dtype) {
  constexpr int64_t MOST = 16;
  STD_TORCH_CHECK(dims <= MOST, "x: expected at most 16 dimensions, got ", dims);
  int64_t strides[MOST], next = 1;
  for (int64_t i = dims; i-- > 0; next *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = next;
  int32_t device_type, device_index;
  check(aoti_torch_get_device_type(like.handle, &device_type));
  check(aoti_torch_get_device_index(like.handle, &device_index));
  AtenTensorHandle made;
  check(aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &made));
  return Owned(made);
}

Owned empty_like(const Tensor& x) { return empty(x, x.sizes, x.dims, x.dtype); }

void* data(const Owned& tensor) {
  void* found;
  check(aoti_torch_get_data_ptr(tensor.handle, &found));
  return found;
}

// Launches on the current stream of the tensor's GPU, which is current meanwhile.
template <typename Work>
void run([[maybe_unused]] const Tensor& x, const Work& work) {
  void* stream = nullptr;
  DeviceGuardHandle guard = nullptr;
#ifndef NEOBERT_ON_HOST
  int32_t device, current;
  check(aoti_torch_get_device_index(x.handle, &device));
  check(aoti_torch_get_current_device_index(&current));
  if (device != current) check(aoti_torch_create_device_guard(device, &guard));
  check(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  const int code = launch(work, stream);
  if (guard) check(aoti_torch_delete_device_guard(guard));
  STD_TORCH_CHECK(code == 0, "a kernel of neobert's CUDA extension: ", error_text(code));
  taken.fetch_add(1, std::memory_order_relaxed);
}

AtenTensorHandle optional(StableIValue value) {
  const StableIValue* found = to<StableIValue*>(value);
  return found ? to<AtenTensorHandle>(*found) : nullptr;
}

// Ends the ownership of the arguments: tensors first ... last of the stack.
void drop(StableIValue* stack, std::initializer_list<int> tensors) {
  for (int i : tensors) check(aoti_torch_delete_tensor_object(to<AtenTensorHandle>(stack[i])));
}

void drop_optional(StableIValue value) {
  if (to<StableIValue*>(value)) to<std::optional<torch::stable::Tensor>>(value);
}

bool is_vector(const Tensor& vector, const Tensor& weight) {
  return vector.dtype == weight.dtype && vector.contiguous() && vector.aligned();
}

bool add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, AtenTensorHandle bias,
              double eps, bool centered, Owned& y, Owned& h) {
  const auto stride = x.row_stride(), residual_stride = residual.row_stride();
  const auto type = x.type(), weight_type = weight.type();
  const int64_t C = x.dims ? x.last() : 0;
  if (!stride || !residual_stride || !weight_type || residual.dtype != x.dtype) return false;
  if (C % 8 || !C || C > MOST_CHANNELS || !is_vector(weight, weight)) return false;
  if (weight_type != type && weight_type != Type::float32) return false;
  const Tensor shift = bias ? Tensor(bias) : Tensor();
  if (bias && !is_vector(shift, weight)) return false;
  y = empty_like(x);
  h = empty_like(x);
  const Norm work{x.data, residual.data, weight.data, shift.data, data(y), data(h), x.rows(),
                  *stride, *residual_stride, static_cast<int>(C), static_cast<float>(eps),
                  centered, *type, *weight_type};
  if (work.rows) run(x, work);
  return true;
}

bool add_rms_norm(StableIValue* stack) {
  if (!use(ADD_RMS_NORM)) return false;
  Owned y, h;
  if (!add_norm(Tensor(stack[0]), Tensor(stack[1]), Tensor(stack[2]), nullptr,
                to<double>(stack[3]), false, y, h)) {
    return false;
  }
  drop(stack, {0, 1, 2});
  stack[0] = give(y);
  stack[1] = give(h);
  return true;
}

bool add_layer_norm(StableIValue* stack) {
  if (!use(ADD_LAYER_NORM)) return false;
  Owned y, h;
  if (!add_norm(Tensor(stack[0]), Tensor(stack[1]), Tensor(stack[2]), optional(stack[3]),
                to<double>(stack[4]), true, y, h)) {
    return false;
  }
  drop(stack, {0, 1, 2});
  drop_optional(stack[3]);
  stack[0] = give(y);
  stack[1] = give(h);
  return true;
}

bool gated_unit(StableIValue* stack) {
  const bool gelu = to<bool>(stack[1]);
  if (!use(gelu ? GEGLU : SWIGLU)) return false;
  const Tensor x(stack[0]);
  const auto stride = x.row_stride();
  if (!stride || x.dims > 16 || x.last() % 16 || x.last() / 2 > INT32_MAX / 2) return false;
  int64_t sizes[16];
  std::copy(x.sizes, x.sizes + x.dims, sizes);
  sizes[x.dims - 1] /= 2;
  Owned y = empty(x, sizes, x.dims, x.dtype);
  const Gated work{x.data, data(y), x.rows(), *stride, static_cast<int>(x.last() / 2), gelu,
                   *x.type()};
  if (work.rows && work.width) run(x, work);
  drop(stack, {0});
  stack[0] = give(y);
  return true;
}

bool is_heads(const Tensor& x) {
  return x.type() && x.dims == 3 && x.size(2) % 16 == 0 && x.size(2) && x.size(1) &&
         x.size(2) <= MOST_CHANNELS && x.size(1) * x.size(2) <= INT32_MAX / 4 && x.stride(2) == 1 &&
         x.aligned() && x.aligned(x.stride(0)) && x.aligned(x.stride(1));
}

bool is_table(const Tensor& table) { return table.contiguous() && table.aligned(); }

Heads heads(const Tensor& x, const Tensor& y) {
  return {x.data, y.data, static_cast<int>(x.size(1)), x.stride(0), x.stride(1), y.stride(0),
          y.stride(1)};
}

bool rope(StableIValue* stack) {
  const Tensor x(stack[0]), cos(stack[1]), sin(stack[2]);
  const bool interleaved = to<bool>(stack[3]);
  if (!use(ROPE) || !is_heads(x) || !is_table(cos) || !is_table(sin)) return false;
  Owned y = empty_like(x);
  const Rope work{heads(x, Tensor(y.handle)), {}, reinterpret_cast<const float*>(cos.data),
                  reinterpret_cast<const float*>(sin.data), x.size(0),
                  static_cast<int>(x.size(2)), interleaved, interleaved, to<bool>(stack[4]),
                  *x.type()};
  if (work.tokens) run(x, work);
  drop(stack, {0, 1, 2});
  stack[0] = give(y);
  return true;
}

bool rope_into(StableIValue* stack) {
  const Tensor x(stack[0]), cos(stack[1]), sin(stack[2]), out(stack[4]);
  const bool interleaved = to<bool>(stack[3]);
  if (!use(ROPE) || !is_heads(x) || !is_heads(out)) return false;
  if (!is_table(cos) || !is_table(sin)) return false;
  const Rope work{heads(x, out), {}, reinterpret_cast<const float*>(cos.data),
                  reinterpret_cast<const float*>(sin.data), x.size(0),
                  static_cast<int>(x.size(2)), interleaved, interleaved, false, *x.type()};
  if (work.tokens) run(x, work);
  drop(stack, {0, 1, 2, 4});
  return true;
}

bool rope_pair(StableIValue* stack) {
  const Tensor q(stack[0]), k(stack[1]), cos(stack[2]), sin(stack[3]);
  if (!use(ROPE) || !is_heads(q) || !is_heads(k) || q.dtype != k.dtype) return false;
  if (!is_table(cos) || !is_table(sin)) return false;
  const int64_t sizes[3] = {q.size(0), q.size(1) + k.size(1), q.size(2)};
  Owned both = empty(q, sizes, 3, q.dtype);
  const Tensor turned(both.handle);
  Rope work{heads(q, turned), heads(k, turned), reinterpret_cast<const float*>(cos.data),
            reinterpret_cast<const float*>(sin.data), q.size(0), static_cast<int>(q.size(2)),
            to<bool>(stack[4]), false, false, *q.type()};
  work.second.y = turned.data + q.size(1) * q.size(2) * q.bytes();
  if (work.tokens) run(q, work);
  drop(stack, {0, 1, 2, 3});
  stack[0] = give(both);
  return true;
}

bool pool(StableIValue* stack) {
  const Tensor x(stack[0]), bounds(stack[1]);
  const bool mean = to<bool>(stack[2]), normalize = to<bool>(stack[3]);
  const auto stride = x.row_stride();
  if (!use(MEAN_POOL) || !mean || !stride || x.dims != 2 || !bounds.contiguous()) return false;
  const int64_t T = x.size(0), C = x.size(1), B = bounds.size(0) - 1;
  if (T < 1 || T > INT32_MAX || C < 1 || C % 8 || B < 1 || C > MOST_CHANNELS) return false;
  if (T / 128 + B > INT32_MAX) return false;
  const bool rounded = normalize && *x.type() != Type::float32;
  const int32_t wide = aoti_torch_dtype_float32();
  const int64_t pooled[2] = {B, C}, units[2] = {rounded ? B : 0, C}, lengths[1] = {normalize ? B : 0};
  Owned y = empty(x, pooled, 2, x.dtype), unit = empty(x, units, 2, wide),
        norm = empty(x, lengths, 1, wide);
  Pool work{x.data, reinterpret_cast<const int32_t*>(bounds.data), data(y),
            rounded ? static_cast<float*>(data(unit)) : nullptr,
            normalize ? static_cast<float*>(data(norm)) : nullptr, nullptr, T, *stride,
            static_cast<int>(B), static_cast<int>(C), normalize, *x.type()};
  const int64_t rows[2] = {scratch_rows(work), C};
  Owned sums;  // freed in the order of the stream, as everything is that PyTorch allocates
  if (rows[0]) {
    sums = empty(x, rows, 2, wide);
    work.sums = static_cast<float*>(data(sums));
  }
  run(x, work);
  drop(stack, {0, 1});
  stack[0] = give(y);
  stack[1] = give(unit);
  stack[2] = give(norm);
  return true;
}

template <bool (*take)(StableIValue*)>
struct Operator {
  static inline const char* other = nullptr;

  static void call(StableIValue* stack, uint64_t, uint64_t) {
    if (!take(stack)) check(torch_call_dispatcher(other, "", stack, TORCH_ABI_VERSION));
  }
  static void add(torch::stable::detail::StableLibrary& library, const char* name,
                  const char* other_name) {
    other = other_name;
    library.impl(name, &call);
  }
};

}  // namespace

#define NEOBERT_ADD(name) \
  Operator<&name>::add(library, #name, NEOBERT_TEXT(NEOBERT_NAMESPACE) "::" #name "_triton")

STABLE_TORCH_LIBRARY_IMPL(NEOBERT_NAMESPACE, NEOBERT_KEY, library) {
  NEOBERT_ADD(add_rms_norm);
  NEOBERT_ADD(add_layer_norm);
  NEOBERT_ADD(gated_unit);
  NEOBERT_ADD(rope);
  NEOBERT_ADD(rope_into);
  NEOBERT_ADD(rope_pair);
  NEOBERT_ADD(pool);
}

}  // namespace neobert

extern "C" {

// Read in the file, before it is loaded.
extern __attribute__((used, visibility("default"))) const char neobert_cuda_about[] =
    "neobert-cuda-extension{" NEOBERT_ABOUT "}";

__attribute__((visibility("default"))) const char* neobert_cuda_refused() {
  return neobert::refused();
}

__attribute__((visibility("default"))) void neobert_cuda_choose(uint32_t operators) {
  neobert::chosen.store(operators, std::memory_order_relaxed);
}

__attribute__((visibility("default"))) uint64_t neobert_cuda_taken() {
  return neobert::taken.load(std::memory_order_relaxed);
}
}
