// A CUDA device made of the CPU's memory and its operators, for a build of PyTorch without CUDA. __init__.py beside it tells what for.
//
// Tensors are what they are on a GPU: their device is cuda:0, their storages' memory is counted and can run out, autograd runs in the
// device's thread. What an operator reads and writes lies in the CPU's memory, so that it is run there on tensors over the same storages.
// As on a GPU an operator refuses tensors on two devices.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/library.h>

#include <atomic>
#include <unordered_map>
#include <unordered_set>

namespace {

using at::Tensor;
using c10::IValue;

const c10::Device kDevice(c10::kCUDA, 0);
std::atomic<int64_t> held{0}, peak{0}, limit{int64_t{1} << 40}, to_host{0};

void count(int64_t nbytes) {
  const auto now = held += nbytes;
  if (nbytes > 0 && now > limit) {
    held -= nbytes;
    TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory (emulated). Tried to allocate ", nbytes, " bytes; ", now - nbytes, " of ", limit.load(), " are held");
  }
  for (auto before = peak.load(); before < now && !peak.compare_exchange_weak(before, now);) {
  }
}

// Memory of the device: held by the CPU's storage, counted while it is there.
struct Held {
  c10::Storage storage;
  int64_t nbytes;
};

c10::Storage on_device(const c10::Storage& made) {
  const auto nbytes = static_cast<int64_t>(made.nbytes());
  count(nbytes);
  auto* context = new Held{made, nbytes};
  auto free = [](void* given) {
    auto* context = static_cast<Held*>(given);
    held -= context->nbytes;
    delete context;
  };
  return c10::Storage(c10::Storage::use_byte_size_t(), nbytes, c10::DataPtr(made.mutable_data(), context, free, kDevice), nullptr, false);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    count(static_cast<int64_t>(n));
    struct Block { c10::DataPtr data; int64_t nbytes; };
    auto* block = new Block{c10::GetCPUAllocator()->allocate(n), static_cast<int64_t>(n)};
    auto free = [](void* given) {
      auto* block = static_cast<Block*>(given);
      held -= block->nbytes;
      delete block;
    };
    return {block->data.get(), block, free, kDevice};
  }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

Tensor like(const Tensor& shape, c10::Storage storage, c10::DispatchKey key) {
  c10::DispatchKeySet keys(key);
  if (shape.is_conj()) keys = keys.add(c10::DispatchKey::Conjugate);
  if (shape.is_neg()) keys = keys.add(c10::DispatchKey::Negative);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, shape.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(shape.sizes(), shape.strides(), shape.storage_offset());
  if (shape.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return made;
}

// One call: the tensors on the device, and those on the CPU over the same memory that stand for them.
struct Call {
  std::vector<std::pair<Tensor, Tensor>> given;  // on the device, on the CPU
  std::unordered_map<const void*, c10::Storage> storages;  // by their address

  Tensor host(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    for (const auto& [device, cpu] : given) {
      if (device.is_same(tensor)) return cpu;
    }
    const auto& storage = tensor.storage();
    void* place = storage.mutable_data();
    if (place != nullptr) storages.emplace(place, storage);
    auto* context = new c10::Storage(storage);
    c10::DataPtr data(place, context, [](void* s) { delete static_cast<c10::Storage*>(s); }, c10::kCPU);
    c10::Storage there(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
    auto cpu = like(tensor, std::move(there), c10::DispatchKey::CPU);
    given.emplace_back(tensor, cpu);
    return cpu;
  }

  c10::Storage storage_of(const Tensor& cpu) {
    const auto found = storages.find(cpu.storage().data());
    if (found != storages.end()) return found->second;
    auto made = on_device(cpu.storage());
    if (cpu.storage().data() != nullptr) storages.emplace(cpu.storage().data(), made);
    return made;
  }

  Tensor device(const Tensor& cpu) {
    if (!cpu.defined() || cpu.is_cuda()) return cpu;
    for (const auto& [device, own] : given) {
      if (own.is_same(cpu)) return device;
    }
    return like(cpu, storage_of(cpu), c10::DispatchKey::CUDA);
  }

  // What an operator has given another shape or other memory.
  void bring_back() {
    for (const auto& [device, cpu] : given) {
      auto* impl = device.unsafeGetTensorImpl();
      if (cpu.storage().data() != device.storage().data()) impl->set_storage_keep_dtype(storage_of(cpu));
      if (cpu.sizes() != device.sizes() || cpu.strides() != device.strides() || cpu.storage_offset() != device.storage_offset()) {
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
      }
    }
  }
};

// Operators of which a GPU takes some tensors on the CPU.
const std::unordered_set<std::string> kTakesBoth = {
    "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index", "aten::_unsafe_index_put"};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto begin = stack->size() - schema.arguments().size();
  Call call;
  bool device = false, cpu = false;
  const auto see = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    device |= tensor.is_cuda();
    cpu |= tensor.is_cpu() && tensor.dim() > 0;
  };
  for (auto i = begin; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      see(value.toTensor());
      value = call.host(value.toTensor());
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) {
        see(tensor);
        tensor = call.host(tensor);
      }
      value = IValue(c10::List<Tensor>(at::TensorList(tensors)));
    } else if (value.isOptionalTensorList()) {
      auto tensors = value.toOptionalTensorVector();
      c10::List<std::optional<Tensor>> hosts;
      for (auto& tensor : tensors) {
        if (tensor) see(*tensor);
        hosts.push_back(tensor ? std::optional<Tensor>(call.host(*tensor)) : std::nullopt);
      }
      value = IValue(hosts);
    } else if (value.isDevice() && value.toDevice().is_cuda()) {
      value = IValue(c10::Device(c10::kCPU));
    }
  }
  TORCH_CHECK(
      !(device && cpu) || kTakesBoth.count(schema.name()) > 0, schema.name(),
      ": expected all tensors to be on the same device, but found cuda:0 and cpu (emulated)");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.bring_back();
  const auto returns = schema.returns().size();
  for (auto i = stack->size() - returns; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.device(value.toTensor());
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) tensor = call.device(tensor);
      value = IValue(c10::List<Tensor>(at::TensorList(tensors)));
    }
  }
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.is_cpu() && source.is_cuda()) ++to_host;
  Call call;
  auto to = call.host(self);
  to.copy_(call.host(source), non_blocking);
  return self;
}

c10::Scalar local_scalar_dense(const Tensor& self) {
  ++to_host;
  Call call;
  return at::_local_scalar_dense(call.host(self));
}

// Products that a GPU adds up in another dtype than that of their factors.
Tensor wide_mm(const Tensor& a, const Tensor& b, at::ScalarType dtype) { return at::mm(a.to(dtype), b.to(dtype)); }
Tensor wide_addmm(const Tensor& sum, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta, const at::Scalar& alpha) {
  return at::addmm(sum, a.to(dtype), b.to(dtype), beta, alpha);
}
Tensor& mm_out(const Tensor& a, const Tensor& b, at::ScalarType dtype, Tensor& out) { return out.copy_(wide_mm(a, b, dtype)); }
Tensor& addmm_out(
    const Tensor& sum, const Tensor& a, const Tensor& b, at::ScalarType dtype, const at::Scalar& beta, const at::Scalar& alpha, Tensor& out) {
  return out.copy_(wide_addmm(sum, a, b, dtype, beta, alpha));
}

// Whose mean is made of an output that is there already, with a warning that it is resized.
Tensor mse_loss(const Tensor& self, const Tensor& target, int64_t reduction) {
  Call call;
  return call.device(at::mse_loss(call.host(self), call.host(target), reduction));
}

// Attention as a GPU has it: one operator that keeps no matrix of all pairs of tokens, where the CPU has one for these tensors.
int64_t attention_choice(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout, bool causal,
    std::optional<double> scale, bool grouped) {
  if (query.unsafeGetTensorImpl()->is_python_dispatch()) return static_cast<int64_t>(sdp::SDPBackend::math);  // it stands for another
  Call call;
  const auto given = mask ? std::optional<Tensor>(call.host(*mask)) : std::nullopt;
  const auto chosen = at::_fused_sdp_choice(call.host(query), call.host(key), call.host(value), given, dropout, causal, scale, grouped);
  return static_cast<int64_t>(chosen == static_cast<int64_t>(sdp::SDPBackend::math) ? sdp::SDPBackend::math : sdp::SDPBackend::overrideable);
}

using Attended = std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>;

Attended attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, double dropout, bool causal, bool,
    std::optional<double> scale) {
  Call call;
  const auto mask = bias ? std::optional<Tensor>(call.host(*bias)) : std::nullopt;
  auto [out, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      call.host(query), call.host(key), call.host(value), dropout, causal, mask, scale);
  return {call.device(out), call.device(sums), {}, {}, query.sym_size(2), key.sym_size(2), {}, {}, {}};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, std::array<bool, 4>, const Tensor& out,
    const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool causal, const Tensor&, const Tensor&,
    std::optional<double> scale) {
  Call call;
  const auto mask = bias.defined() ? std::optional<Tensor>(call.host(bias)) : std::nullopt;
  auto [q, k, v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      call.host(grad), call.host(query), call.host(key), call.host(value), call.host(out), call.host(sums), dropout, causal, mask, scale);
  return {call.device(q), call.device(k), call.device(v), {}};
}

Tensor& set_storage(Tensor& self, c10::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(at::IntArrayRef{size}, at::IntArrayRef{int64_t{1}}, 0);
  return self;
}

Tensor& set_strided(Tensor& self, c10::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(size, stride, offset);
  return self;
}

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

Allocator allocator;

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>)
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("copy_", &copy_);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_strided);
  m.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
  m.impl("mse_loss", &mse_loss);
  m.impl("mm.dtype", &wide_mm);
  m.impl("mm.dtype_out", &mm_out);
  m.impl("addmm.dtype_out", &addmm_out);
  m.impl("addmm.dtype", &wide_addmm);
  m.impl("_local_scalar_dense", &local_scalar_dense);
}

extern "C" {
// PyTorch has looked for CUDA when it was imported and keeps what it found: that object is given this one's functions.
void emulate() {
  static Hooks ours;
  auto* found = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(found) = *reinterpret_cast<void**>(&ours);
  c10::SetAllocator(c10::kCUDA, &allocator);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&attention_choice);
}
int64_t memory_held() { return held; }
int64_t memory_peak() { return peak; }
int64_t memory_limit() { return limit; }
int64_t copies_to_host() { return to_host; }
void reset_peak() { peak = held.load(); }
void set_limit(int64_t nbytes) { limit = nbytes; }
}
