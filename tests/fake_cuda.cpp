// Tensors of CUDA devices whose memory is the host's, for a torch that was built without CUDA.
//
// Operations are made by the CPU's kernels on the same memory: `on_host` gives each operation tensors
// of the CPU that share it. Only what makes memory or views of it must be registered by itself. There
// is no backward pass, for which torch would ask what was built in.

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <optional>
#include <vector>

namespace {

constexpr c10::DeviceType CUDA = c10::DeviceType::CUDA;
constexpr c10::DeviceIndex N_DEVICES = 2;

// How often the host waited for a device, to read a number or copy from it.
int64_t waits = 0;

thread_local c10::DeviceIndex current = 0;

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    auto memory = c10::GetCPUAllocator()->allocate(n);
    auto deleter = memory.get_deleter();
    void* data = memory.get();
    void* context = memory.release_context();
    return {data, context, deleter, c10::Device(CUDA, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before(CUDA, current);
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {CUDA, current}; }
  void setDevice(c10::Device device) const override {
    if (device.index() >= 0) current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return N_DEVICES; }
};

Allocator allocator;
c10::impl::DeviceGuardImplRegistrar guard(CUDA, new Guard);
struct SetAllocator {
  SetAllocator() { c10::SetAllocator(CUDA, &allocator); }
} set_allocator;

using Pairs = std::vector<std::pair<at::Tensor, at::Tensor>>;  // of the device, and of the host

at::Tensor host_of(const at::Tensor& tensor, Pairs& pairs) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  for (auto& pair : pairs)
    if (pair.first.is_same(tensor)) return pair.second;
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), tensor.storage().nbytes(),
      c10::DataPtr(tensor.storage().mutable_data(), c10::Device(c10::kCPU)), c10::GetCPUAllocator(),
      true);
  auto host = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  host.unsafeGetTensorImpl()->set_sizes_and_strides(
      tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) host._set_conj(true);
  if (tensor.is_neg()) host._set_neg(true);
  pairs.emplace_back(tensor, host);
  return host;
}

// What an operation has resized.
void give_back(const Pairs& pairs) {
  for (auto& [tensor, host] : pairs) {
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    if (storage->data() != host.storage().data()) {
      storage->set_data_ptr_noswap(c10::DataPtr(
          host.storage().mutable_data(), new at::Tensor(host),
          [](void* kept) { delete static_cast<at::Tensor*>(kept); }, tensor.device()));
      storage->set_nbytes(host.storage().nbytes());
    }
    if (tensor.sizes() != host.sizes() || tensor.strides() != host.strides())
      tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides());
  }
}

at::Tensor device_of(const at::Tensor& tensor, Pairs& pairs, c10::Device device) {
  if (!tensor.defined() || !tensor.is_cpu()) return tensor;
  for (auto& pair : pairs)
    if (pair.second.is_same(tensor)) return pair.first;
  auto data = tensor.contiguous(tensor.suggest_memory_format());
  if (!tensor.is_contiguous(tensor.suggest_memory_format())) data = tensor;
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), data.storage().nbytes(),
      c10::DataPtr(
          data.storage().mutable_data(), new at::Tensor(data),
          [](void* kept) { delete static_cast<at::Tensor*>(kept); }, device),
      &allocator, true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(c10::DispatchKey::CUDA), data.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(
      data.sizes(), data.strides(), data.storage_offset());
  return result;
}

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Pairs pairs;
  std::optional<c10::Device> device;
  const auto n = op.schema().arguments().size();
  const auto begin = stack->size() - n;
  bool mixes = false;
  auto convert = [&](const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    mixes |= tensor.is_cpu() && tensor.dim() > 0;
    mixes |= tensor.is_cuda() && device && *device != tensor.device();
    if (tensor.is_cuda() && !device) device = tensor.device();
    return host_of(tensor, pairs);
  };
  for (size_t i = begin; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = convert(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(convert(tensor));
      value = c10::List<at::Tensor>(tensors);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList().vec())
        tensors.push_back(tensor ? std::optional(convert(*tensor)) : tensor);
      value = tensors;
    } else if (value.isDevice()) {
      if (value.toDevice().is_cuda()) {
        device = value.toDevice();
        value = c10::Device(c10::kCPU);
      }
    }
  }
  TORCH_CHECK(!mixes, "Expected all tensors to be on the same device: ", op.schema());
  const c10::Device there = device.value_or(c10::Device(CUDA, current));
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  give_back(pairs);
  const auto n_results = op.schema().returns().size();
  for (size_t i = stack->size() - n_results; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = device_of(value.toTensor(), pairs, there);
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector())
        tensors.push_back(device_of(tensor, pairs, there));
      value = c10::List<at::Tensor>(tensors);
    }
  }
}

c10::DeviceIndex index_of(std::optional<at::Device> device) {
  return device && device->has_index() ? device->index() : current;
}

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::Device(CUDA, index_of(device)));
  return at::detail::empty_generic_symint(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype),
      format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(c10::Device(CUDA, index_of(device)));
  return at::detail::empty_strided_symint_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype));
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  Pairs pairs;
  if (source.is_cuda() && !self.is_cuda() && !non_blocking) ++waits;
  host_of(self, pairs).copy_(host_of(source, pairs));
  return self;
}

at::Scalar item(const at::Tensor& self) {
  Pairs pairs;
  ++waits;
  return host_of(self, pairs).item();
}

TORCH_LIBRARY(fake_cuda, m) {
  m.def("waits() -> int", [] { return waits; });
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
}

}  // namespace
