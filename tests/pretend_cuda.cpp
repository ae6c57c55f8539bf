// A "CUDA device" whose memory is the host's: every operation on its tensors runs the CPU's kernel on the
// same memory. See pretend_cuda.py for what this can show and what it cannot.
//
// Tensors are ordinary ones of device cuda:0 (no subclass), so views, parameters, storages, pickles and
// autograd are torch's own. An operation that torch has no kernel for on CUDA, and that is all of them in a
// build for the CPU, comes to `fallback`.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <unordered_set>

using at::Tensor;
using c10::IValue;

namespace {

const c10::Device CUDA(c10::DeviceType::CUDA, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

int64_t allocated = 0, peak = 0, limit = -1, fail_at = -1, allocations = 0;
int64_t syncs = 0, to_device = 0, to_host = 0;
bool capturing = false;
std::vector<std::string> sync_log;

// ---- waiting for the device -----------------------------------------------------------------------------

void synchronizes(const std::string& what) {
  TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing (", what, ")");
  ++syncs;
  sync_log.push_back(what);
}

void copies_to_device(const std::string& what) {
  TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing (", what, ")");
  ++to_device;
}

// ---- memory ---------------------------------------------------------------------------------------------

void take(int64_t bytes) {
  ++allocations;
  bool full = (limit >= 0 && allocated + bytes > limit) || (fail_at >= 0 && allocations >= fail_at);
  TORCH_CHECK_WITH(OutOfMemoryError, !full, "CUDA out of memory. Tried to allocate ", bytes, " bytes of ", limit);
  allocated += bytes;
  peak = std::max(peak, allocated);
}

struct Held {
  c10::DataPtr memory;
  c10::Storage storage;
  int64_t bytes;
};

void release(void* held) {
  allocated -= static_cast<Held*>(held)->bytes;
  delete static_cast<Held*>(held);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    take(bytes);
    auto* held = new Held{c10::GetCPUAllocator()->allocate(bytes), {}, (int64_t)bytes};
    void* at = held->memory.get();
    if (at) std::memset(at, 0xff, bytes);  // NaN, -1: whoever reads what nobody wrote shall notice
    return {at, held, &release, CUDA};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;

Tensor over(const c10::Storage& storage, const Tensor& like, int64_t offset) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), KEYS, like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), offset);
  return out;
}

// A result of a CPU kernel, whose memory becomes the device's.
Tensor adopt(const Tensor& cpu) {
  int64_t bytes = cpu.storage().nbytes();
  take(bytes);
  auto* held = new Held{{}, cpu.storage(), bytes};
  c10::DataPtr at{held->storage.mutable_data(), held, &release, CUDA};
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(at), &allocator, true);
  return over(storage, cpu, cpu.storage_offset());
}

// The same memory as a tensor of the CPU.
Tensor host(const Tensor& t) {
  if (!t.defined() || !t.is_cuda()) return t;
  c10::Storage kept = t.storage();
  auto options = at::TensorOptions().dtype(t.dtype()).device(c10::kCPU);
  if (!kept.nbytes()) return at::empty_strided(t.sizes(), t.strides(), options);
  auto* base = static_cast<char*>(kept.mutable_data());
  return at::from_blob(base, t.sizes(), t.strides(), t.storage_offset(), [kept](void*) {}, options, std::nullopt);
}

// ---- random numbers: the CPU's, behind a generator that says it is the device's ---------------------------

struct Generator final : c10::GeneratorImpl {
  at::Generator inner;
  explicit Generator(at::Generator g) : GeneratorImpl(CUDA, KEYS), inner(std::move(g)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(inner.clone()); }
};

at::Generator new_generator() { return at::make_generator<Generator>(at::detail::createCPUGenerator()); }

// ---- the fallback ---------------------------------------------------------------------------------------

// Results whose size, or whose value, the host waits for.
const std::unordered_set<std::string> WAITS{
    "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::_unique", "aten::histc"};
// Where an index may lie on the CPU; it is copied to the device.
const std::unordered_set<std::string> INDEXING{"aten::index", "aten::_index_put_impl_", "aten::index_put_", "aten::_unsafe_index"};
// Not elementwise by torch's own tags, and yet numbers of the CPU are taken.
const std::unordered_set<std::string> SCALARS{
    "aten::fill_", "aten::masked_fill", "aten::masked_fill_", "aten::where", "aten::index_fill_", "aten::index_fill",
    "aten::linspace", "aten::floor_divide", "aten::_index_put_impl_"};

void for_tensors(const IValue& v, const std::function<void(const Tensor&)>& see) {
  if (v.isTensor()) {
    if (v.toTensor().defined()) see(v.toTensor());
  } else if (v.isTensorList()) {
    for (const Tensor& t : v.toTensorVector()) see(t);
  } else if (v.isList()) {
    for (const IValue& e : v.toListRef()) for_tensors(e, see);
  }
}

void check_devices(const c10::OperatorHandle& op, const std::vector<IValue>& args) {
  const auto& name = op.schema().name();
  bool scalars = op.hasTag(at::Tag::pointwise) || SCALARS.count(name);
  bool on_device = false;
  for (const auto& a : args) for_tensors(a, [&](const Tensor& t) { on_device |= t.is_cuda(); });
  for (size_t i = 0; i < args.size(); ++i) {
    const auto* alias = op.schema().arguments()[i].alias_info();
    bool written = alias && alias->isWrite();
    if (args[i].isGenerator() && args[i].toGenerator().defined())
      TORCH_CHECK(args[i].toGenerator().device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
    for_tensors(args[i], [&](const Tensor& t) {
      if (t.is_cuda() || !on_device) return;
      if (INDEXING.count(name) && i == 1 && args[0].toTensor().is_cuda()) return copies_to_device(name + " by indices of the host");
      bool number = t.unsafeGetTensorImpl()->is_wrapped_number() || (t.dim() == 0 && scalars && !written);
      TORCH_CHECK(number, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and ",
                  t.device(), "! (", op.schema().name(), ", argument ", i, ")");
    });
  }
}

void count_waits(const c10::OperatorHandle& op, const std::vector<IValue>& args) {
  const auto& name = op.schema().name();
  if (WAITS.count(name)) synchronizes(name);
  if (name == "aten::repeat_interleave" && args.size() == 2 && args[1].isNone()) synchronizes(name);
  if (name != "aten::_index_put_impl_") return;
  bool masks = false, one = args[2].toTensor().numel() == 1;
  for_tensors(args[1], [&](const Tensor& t) { masks |= t.scalar_type() == at::kBool || t.scalar_type() == at::kByte; });
  if (masks && !one) synchronizes("aten::_index_put_impl_ by a mask");
}

struct Translation {
  std::vector<std::pair<Tensor, Tensor>> pairs;  // of the device, of the host

  Tensor in(const Tensor& t) {
    if (!t.defined() || !t.is_cuda()) return t;
    for (auto& [device, cpu] : pairs)
      if (device.is_same(t)) return cpu;
    pairs.emplace_back(t, host(t));
    return pairs.back().second;
  }

  IValue in(const IValue& v) {
    if (v.isTensor()) return in(v.toTensor());
    if (v.isDevice()) return v.toDevice().is_cuda() ? IValue(c10::Device(c10::kCPU)) : v;
    if (v.isGenerator()) {
      auto* own = dynamic_cast<Generator*>(v.toGenerator().unsafeGetGeneratorImpl());
      return own ? IValue(own->inner) : v;
    }
    if (v.isTensorList()) {
      c10::List<Tensor> out;
      for (const Tensor& t : v.toTensorVector()) out.push_back(in(t));
      return out;
    }
    if (v.isList() && v.toList().elementType()->kind() == c10::TypeKind::OptionalType) {
      c10::List<std::optional<Tensor>> out;
      for (const IValue& e : v.toListRef()) out.push_back(e.isNone() ? std::optional<Tensor>() : in(e.toTensor()));
      return out;
    }
    return v;
  }

  Tensor out(const Tensor& t) {
    if (!t.defined()) return t;
    for (auto& [device, cpu] : pairs)
      if (cpu.is_same(t)) return device;
    for (auto& [device, cpu] : pairs)
      if (cpu.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl())
        return over(device.storage(), t, t.storage_offset());
    return adopt(t);
  }

  IValue out(const IValue& v) {
    if (v.isTensor()) return out(v.toTensor());
    if (!v.isTensorList()) return v;
    c10::List<Tensor> result;
    for (const Tensor& t : v.toTensorVector()) result.push_back(out(t));
    return result;
  }

  // A kernel may have given a result its size.
  void resized() {
    for (auto& [device, cpu] : pairs)
      if (device.sizes() != cpu.sizes()) {
        device.resize_(cpu.sizes());
        host(device).copy_(cpu);
      }
  }
};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  auto given = torch::jit::pop(*stack, op.schema().arguments().size());
  std::vector<IValue> args(given.begin(), given.end());
  TORCH_CHECK(op.schema().name().rfind("aten::", 0) == 0, "Could not run '", op.schema().name(), "' with arguments from the 'CUDA' backend.");
  check_devices(op, args);
  count_waits(op, args);
  Translation translation;
  for (const auto& a : args) stack->push_back(translation.in(a));
  op.callBoxed(stack);
  translation.resized();
  auto results = torch::jit::pop(*stack, op.schema().returns().size());
  for (const auto& r : results) stack->push_back(translation.out(r));
}

// ---- what works on memory itself --------------------------------------------------------------------------

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below;
  TORCH_CHECK(!self.is_meta() && !source.is_meta(), "Cannot copy out of meta tensor; no data!");
  if (self.is_cuda() && !source.is_cuda()) copies_to_device("a copy from the host");
  if (!self.is_cuda() && source.is_cuda()) {
    synchronizes("a copy to the host");
    ++to_host;
  }
  host(self).copy_(host(source));
  return self;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  synchronizes("item");
  return at::_local_scalar_dense(host(self));
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  return self;
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  TORCH_CHECK(source.device().is_cuda(), "Attempted to set the storage of a tensor on device \"cuda:0\" to a storage on different device \"cpu\".");
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  int64_t n = source.nbytes() / self.itemsize();
  return set_storage(self, std::move(source), 0, {n}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// bf16 tensor cores that accumulate in fp32 and do not round: torch has this for CUDA only.
Tensor mm_dtype(const Tensor& a, const Tensor& b, at::ScalarType dtype) {
  TORCH_CHECK(a.is_cuda() && b.is_cuda(), "Expected all tensors to be on the same device (mm)");
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && dtype == at::kFloat && (a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf),
              "out_dtype only supported for bf16 and fp16 inputs and fp32");
  return adopt(at::mm(host(a).to(dtype), host(b).to(dtype)));
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout,
                 bool causal, std::optional<double> scale, bool gqa) {
  at::AutoDispatchBelowADInplaceOrView below;
  for (const Tensor& t : {k, v, mask.value_or(q)})
    TORCH_CHECK(t.is_cuda(), "Expected all tensors to be on the same device (scaled_dot_product_attention)");
  auto bias = mask ? std::optional<Tensor>(host(*mask)) : std::nullopt;
  return adopt(at::scaled_dot_product_attention(host(q), host(k), host(v), bias, dropout, causal, scale, gqa));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("resize_", resize_);
  m.impl("as_strided", as_strided);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("mm.dtype", mm_dtype);
  m.impl("scaled_dot_product_attention", attention);
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return CUDA; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, CUDA); }
};
Guard guard;

}  // namespace

namespace at {
struct PretendedHooks : public CUDAHooksInterface {
  PretendedHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  Device getDeviceFromPtr(void*) const override { return ::CUDA; }
  Generator getNewGenerator(DeviceIndex) const override { return new_generator(); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static Generator own = make_generator<::Generator>(at::detail::getDefaultCPUGenerator());
    return own;
  }
};

// torch has made its hooks already, of a class that refuses: they get this one's functions.
void take_over_hooks() {
  static PretendedHooks own{{}};
  auto& hooks = const_cast<CUDAHooksInterface&>(detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(&hooks), static_cast<void*>(&own), sizeof(void*));
}
}  // namespace at

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::impl::device_guard_impl_registry[(int)c10::DeviceType::CUDA].store(&guard);
  at::take_over_hooks();
  c10::SetAllocator(c10::DeviceType::CUDA, &allocator, 1);
  m.def("host", &host, "The same memory as a tensor of the CPU.");
  m.def("at_address", [](const Tensor& like, int64_t address) {  // like: meta
    auto options = at::TensorOptions().dtype(like.dtype()).device(c10::kCPU);
    Tensor cpu = at::from_blob(reinterpret_cast<void*>(address), like.sizes(), like.strides(), 0, [](void*) {}, options, std::nullopt);
    int64_t bytes = cpu.storage().nbytes();
    auto* held = new Held{{}, cpu.storage(), 0};
    c10::DataPtr at{held->storage.mutable_data(), held, &release, CUDA};
    return over(c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(at), &allocator, true), cpu, 0);
  }, "A tensor of the device over memory that somebody else holds.");
  m.def("capture", [](bool on) { capturing = on; });
  m.def("capturing", [] { return capturing; });
  m.def("synchronize", &synchronizes);
  m.def("counts", [] { return std::make_tuple(syncs, to_device, to_host, allocations); });
  m.def("sync_log", [] { return sync_log; });
  m.def("reset_counts", [] { syncs = to_device = to_host = allocations = 0; sync_log.clear(); });
  m.def("set_limit", [](int64_t bytes) { limit = bytes; });
  m.def("fail_at", [](int64_t n) { fail_at = n; });
  m.def("allocated", [] { return allocated; });
  m.def("peak", [] { return peak; });
  m.def("reset_peak", [] { peak = allocated; });
}
