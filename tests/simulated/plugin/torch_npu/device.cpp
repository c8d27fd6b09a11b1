// A simulated accelerator: torch's PrivateUse1 device, its memory on the host, its kernels the CPU's.
//
// Every operation without a kernel here runs `on_host`: the CPU's kernel is called on aliases of the same
// memory, and what it returns is moved to the device without a copy. What a real device refuses (tensors of
// mixed devices, what its vendor's list lacks) is refused, and faults can be planted in any operation.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>

namespace {

constexpr auto NPU = c10::DeviceType::PrivateUse1;

int64_t from_environment(const char* name, int64_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : otherwise;
}

// ---- memory -----------------------------------------------------------------------------------------------

constexpr int MAX_DEVICES = 16;

struct Memory {
  std::atomic<int64_t> allocated{0}, peak{0};
};

Memory memories[MAX_DEVICES];
std::atomic<int64_t> memory_limit{from_environment("SIMULATED_NPU_MEMORY", int64_t{1} << 36)};
thread_local c10::DeviceIndex current_device = 0;

c10::DeviceIndex device_count() {
  static const auto count = std::min<int64_t>(from_environment("SIMULATED_NPU_DEVICES", 4), MAX_DEVICES);
  return static_cast<c10::DeviceIndex>(count);
}

// Host memory that counts as the device's: what the context of a device's DataPtr points to.
struct Block {
  c10::Storage owner;  // a host storage
  int64_t bytes;
  c10::DeviceIndex device;

  Block(c10::Storage storage, c10::DeviceIndex index)
      : owner(std::move(storage)), bytes(static_cast<int64_t>(owner.nbytes())), device(index) {
    auto& memory = memories[device];
    const int64_t now = memory.allocated += bytes;
    if (now > memory_limit) {
      memory.allocated -= bytes;
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "NPU out of memory (simulated). Tried to allocate ", bytes, " bytes; ",
          now - bytes, " of ", memory_limit.load(), " are in use");
    }
    int64_t seen = memory.peak;
    while (seen < now && !memory.peak.compare_exchange_weak(seen, now)) {
    }
  }
  ~Block() { memories[device].allocated -= bytes; }
};

c10::DataPtr on_device(c10::Storage host, c10::DeviceIndex device) {
  void* data = host.mutable_data();
  return {data, new Block(std::move(host), device), [](void* b) { delete static_cast<Block*>(b); },
          c10::Device(NPU, device)};
}

c10::Storage host_storage(size_t bytes) {
  auto* allocator = c10::GetCPUAllocator();
  auto data = allocator->allocate(bytes);
  std::memset(data.get(), 0xff, bytes);  // NaN, or −1: what was never written shows
  return {c10::Storage::use_byte_size_t(), bytes, std::move(data), allocator, true};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return on_device(host_storage(bytes), current_device); }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Allocator allocator;
REGISTER_ALLOCATOR(NPU, &allocator);

void resize_storage(const c10::Storage& storage, size_t bytes) {
  if (bytes == storage.nbytes()) return;
  auto host = host_storage(bytes);
  std::memcpy(host.mutable_data(), storage.data(), std::min(bytes, storage.nbytes()));
  storage.set_data_ptr_noswap(on_device(std::move(host), storage.device().index()));
  storage.set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return device_count(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current_device, device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
};

// ---- devices, streams and events: everything is done when the call returns ----------------------------------

thread_local std::map<c10::DeviceIndex, c10::StreamId> current_streams;
std::atomic<c10::StreamId> streams{0};

using Clock = std::chrono::steady_clock;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return NPU; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {NPU, std::exchange(current_device, device.index())};
  }
  c10::Device getDevice() const override { return {NPU, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "invalid simulated npu device ", device.index());
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current_streams[device.index()]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, ++streams);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = std::exchange(current_streams[stream.device_index()], stream.id());
    return c10::Stream(c10::Stream::UNSAFE, stream.device(), before);
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void* from, void* to, c10::DeviceIndex) const override {
    const auto span = *static_cast<Clock::time_point*>(to) - *static_cast<Clock::time_point*>(from);
    return std::chrono::duration<double, std::milli>(span).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- faults -------------------------------------------------------------------------------------------------

struct Fault {
  bool lacking = false;
  double factor = 1, seconds = 0;
};

std::mutex fault_mutex;
std::map<std::string, Fault> faults;  // by the operation's name, as in "aten::mm"

Fault fault_of(const std::string& name) {
  const std::lock_guard<std::mutex> lock(fault_mutex);
  const auto found = faults.find(name);
  return found == faults.end() ? Fault{} : found->second;
}

std::set<std::string> kernels;  // the vendor's, by base name: "aten::scatter_add" for scatter_add_ and its out form

// Torch makes one form of an operation from another, here and there from different ones.
std::string base_name(const std::string& name) {
  auto base = name.substr(0, name.find('.'));
  while (base.back() == '_') base.pop_back();
  return base;
}

bool has_kernel(const std::string& name) { return name.rfind("aten::", 0) != 0 || kernels.count(base_name(name)); }

// What the vendor's library registers no kernel for.
void refuse_what_the_device_lacks(const c10::OperatorHandle& op, const torch::jit::Stack& arguments) {
  static const std::set<std::string> any_dtype{
      "aten::view", "aten::as_strided", "aten::_reshape_alias", "aten::resize_", "aten::_local_scalar_dense",
      "aten::alias", "aten::zero_", "aten::fill_"};
  const auto& name = op.schema().name();
  TORCH_CHECK_NOT_IMPLEMENTED(
      has_kernel(name) && !fault_of(name).lacking, "Could not run '", name,
      "' on the simulated npu: the device has no kernel for it");
  if (name == "aten::topk") {
    TORCH_CHECK(arguments[4].toBool(), "topk: sorted=False is not supported on the simulated npu");
  }
  for (const auto& value : arguments) {
    if (!value.isTensor() || !value.toTensor().defined() || !value.toTensor().is_privateuseone()) continue;
    const auto dtype = value.toTensor().scalar_type();
    TORCH_CHECK(
        dtype != at::kDouble || any_dtype.count(name), name, ": float64 is not supported on the simulated npu");
    TORCH_CHECK(
        name != "aten::sort" || dtype != at::kBFloat16, "sort: bfloat16 is not supported on the simulated npu");
  }
}

// ---- the CPU's kernels on the device's memory ---------------------------------------------------------------

at::Tensor tensor_over(c10::Storage storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return made;
}

// The tensors of one call: device tensors and their host aliases.
class Call {
 public:
  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_privateuseone()) {
      mixed_ = mixed_ || (tensor.defined() && tensor.is_cpu() && tensor.dim() > 0);
      return tensor;
    }
    TORCH_CHECK(
        device_ < 0 || device_ == tensor.device().index(),
        "Expected all tensors to be on the same device, but found simulated npu:", int(device_), " and ",
        tensor.device());
    device_ = tensor.device().index();
    auto [place, is_new] = storages_.try_emplace(tensor.storage().unsafeGetStorageImpl());
    if (is_new) {
      const auto& storage = tensor.storage();
      c10::DataPtr data(
          storage.mutable_data(), new c10::Storage(storage), [](void* s) { delete static_cast<c10::Storage*>(s); },
          c10::Device(c10::kCPU));
      place->second = c10::Storage(
          c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
    }
    auto alias = tensor_over(place->second, tensor, c10::DispatchKey::CPU);
    if (tensor.is_conj()) alias._set_conj(true);
    aliases_.emplace_back(tensor, alias);
    return alias;
  }

  // Take over what the kernel did to its arguments' shapes and storages.
  void finish() {
    for (auto& [tensor, alias] : aliases_) {
      auto* before = tensor.storage().unsafeGetStorageImpl();
      const auto& host = storages_.at(before);
      if (host.data() != before->data() || host.nbytes() != before->nbytes()) {  // resized: new memory
        before->set_data_ptr_noswap(on_device(host, before->device().index()));
        before->set_nbytes(host.nbytes());
      }
      if (alias.sizes() != tensor.sizes() || alias.strides() != tensor.strides()) {
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides());
      }
    }
  }

  at::Tensor to_device(const at::Tensor& result) const {
    if (!result.defined() || !result.is_cpu()) return result;
    for (const auto& [tensor, alias] : aliases_) {
      if (alias.is_same(result)) return tensor;
    }
    for (const auto& [device, host] : storages_) {  // a view of an argument
      if (host.unsafeGetStorageImpl() == result.storage().unsafeGetStorageImpl()) {
        auto owner = c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(device);
        return tensor_over(c10::Storage(std::move(owner)), result, c10::DispatchKey::PrivateUse1);
      }
    }
    const auto bytes = result.storage().nbytes();
    const auto index = device_ < 0 ? current_device : device_;
    c10::Storage moved(
        c10::Storage::use_byte_size_t(), bytes, on_device(result.storage(), index), &allocator, true);
    return tensor_over(std::move(moved), result, c10::DispatchKey::PrivateUse1);
  }

  bool mixes_devices() const { return mixed_ && device_ >= 0; }

 private:
  c10::DeviceIndex device_ = -1;
  bool mixed_ = false;
  std::map<c10::StorageImpl*, c10::Storage> storages_;
  std::vector<std::pair<at::Tensor, at::Tensor>> aliases_;
};

template <typename Change>
void change_tensors(c10::IValue& value, const Change& change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& tensor : list) tensor = change(tensor);
    value = c10::List<at::Tensor>(list);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> changed;
    for (const auto& item : value.toOptionalTensorVector()) {
      changed.push_back(item ? std::optional<at::Tensor>(change(*item)) : std::nullopt);
    }
    value = changed;
  } else if (value.isList() && value.toListRef().size() && value.toListRef()[0].isTensorList()) {
    c10::List<c10::List<at::Tensor>> outer;  // the lists of lists that collectives take
    for (const auto& item : value.toListRef()) {
      c10::IValue inner = item;
      change_tensors(inner, change);
      outer.push_back(inner.toTensorList());
    }
    value = outer;
  }
}

void plant(const Fault& fault, torch::jit::Stack& results) {
  if (fault.seconds > 0) std::this_thread::sleep_for(std::chrono::duration<double>(fault.seconds));
  if (fault.factor == 1) return;
  for (auto& value : results) {
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_floating_point()) {
      value.toTensor().mul_(fault.factor);
      return;
    }
  }
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack, bool may_mix) {
  const size_t count = op.schema().arguments().size();
  const size_t first = stack->size() - count;
  const torch::jit::Stack arguments(stack->begin() + first, stack->end());
  refuse_what_the_device_lacks(op, arguments);
  Call call;
  for (size_t i = first; i < stack->size(); ++i) {
    auto& value = (*stack)[i];
    change_tensors(value, [&](const at::Tensor& t) { return call.to_host(t); });
    if (value.isDevice() && value.toDevice().type() == NPU) value = c10::Device(c10::kCPU);
  }
  TORCH_CHECK(
      may_mix || !call.mixes_devices(), op.schema().name(),
      ": Expected all tensors to be on the same device, but found at least two devices, simulated npu and cpu");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.finish();
  const auto fault = fault_of(op.schema().name());
  torch::jit::Stack results(stack->end() - op.schema().returns().size(), stack->end());
  plant(fault, results);
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    change_tensors((*stack)[i], [&](const at::Tensor& t) { return call.to_device(t); });
  }
}

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run_on_host(op, stack, false);
}

void on_host_mixed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run_on_host(op, stack, true);
}

// ---- what cannot run on the host's aliases --------------------------------------------------------------------

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(NPU, current_device)));
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(NPU, current_device)));
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool) {
  Call from, to;  // two calls: the devices may differ
  to.to_host(target).copy_(from.to_host(source));
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Tensor& set_storage_and_shape(
    at::Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::cpu::set_(self, std::move(source), offset, size, stride);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return at::cpu::set_(self, std::move(source), 0, {size}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::cpu::set_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_and_shape);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_grouped_mm", torch::CppFunction::makeFromBoxedFunction<&on_host>());  // torch would compose it
  for (const char* name : {"index.Tensor", "index_put", "index_put_", "_index_put_impl_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_host_mixed>());  // host indices are allowed
  }
}

struct Quiet final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Collectives: torch's own dispatch picks the process group's backend by the key, and the host's is gloo.
void collectives_on_host() {
  Quiet quiet;  // replacing a kernel is a warning
  const c10::WarningUtils::WarningHandlerGuard guard(&quiet);
  static auto library = torch::Library(
      torch::Library::IMPL, "c10d", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  for (const char* name :
       {"send", "recv_", "recv_any_source_", "reduce_", "broadcast_", "allreduce_", "allreduce_coalesced_",
        "allgather_", "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_",
        "reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "gather_", "scatter_",
        "alltoall_", "alltoall_base_", "barrier", "monitored_barrier_"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_host_mixed>());
  }
}

TORCH_LIBRARY(simulated_npu, m) {
  m.def("start() -> ()", [] {
    static auto* hooks = new Hooks;
    at::RegisterPrivateUse1HooksInterface(hooks);
    collectives_on_host();
  });
  m.def("kernels(str[] names) -> ()", [](const std::vector<std::string>& names) {
    for (const auto& name : names) kernels.insert(base_name(name));
  });
  m.def("devices() -> int", [] { return int64_t{device_count()}; });
  m.def("allocated(int device) -> int", [](int64_t device) { return memories[device].allocated.load(); });
  m.def("peak(int device) -> int", [](int64_t device) { return memories[device].peak.load(); });
  m.def("reset_peak(int device) -> ()", [](int64_t device) {
    memories[device].peak = memories[device].allocated.load();
  });
  m.def("memory_limit() -> int", [] { return memory_limit.load(); });
  m.def("set_memory_limit(int bytes) -> ()", [](int64_t bytes) { memory_limit = bytes; });
  m.def(
      "plant(str op, bool lacking, float factor, float seconds) -> ()",
      [](const std::string& op, bool lacking, double factor, double seconds) {
        const std::lock_guard<std::mutex> lock(fault_mutex);
        faults[op] = {lacking, factor, seconds};
      });
  m.def("clear_faults() -> ()", [] {
    const std::lock_guard<std::mutex> lock(fault_mutex);
    faults.clear();
  });
}
