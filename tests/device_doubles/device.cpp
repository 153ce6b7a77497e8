// A test double of an accelerator: a device of torch's on host memory.
//
// DEVICE_KEY: torch's name of the device, PrivateUse1 for one that a plugin brings.
// Tensors on it are real device tensors (their storage says so, the CPU's kernels refuse them), but
// every operation is done by the CPU on copies. It is watched: operations on 64-bit numbers are
// reported to Python, because such devices may store those in 32 bits.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <optional>
#include <utility>

namespace py = pybind11;

namespace {

constexpr auto DEVICE = c10::DeviceType::DEVICE_KEY;

c10::DeviceIndex device_count() {
  const char* variable = std::getenv("DEVICE_DOUBLE_VISIBLE");  // as the device's row names it
  const char* text = variable == nullptr ? nullptr : std::getenv(variable);
  if (text == nullptr) return 2;
  c10::DeviceIndex count = *text != '\0';
  for (; *text != '\0'; ++text) count += *text == ',';
  return count;
}

thread_local c10::DeviceIndex current = 0;
std::atomic<int64_t> allocated{0};
std::atomic<int64_t> peak{0};

// ---- what Python is told ------------------------------------------------------------------

py::object* watcher = nullptr;  // never freed: the interpreter may be gone when statics die

bool is_wide(const at::Tensor& tensor) {
  return tensor.device().type() == DEVICE &&
      (tensor.scalar_type() == at::kLong || tensor.scalar_type() == at::kDouble);
}

void report(const std::string& operation, const at::Tensor& tensor) {
  if (watcher == nullptr) return;
  py::gil_scoped_acquire acquire;
  (*watcher)(operation, std::string(c10::toString(tensor.scalar_type())));
}

// ---- memory -------------------------------------------------------------------------------

struct Block {
  void* memory;
  int64_t bytes;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->bytes;
  std::free(block->memory);
  delete block;
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr,
                            static_cast<int64_t>(bytes)};
    const int64_t now = allocated += block->bytes;
    if (now > peak) peak = now;
    return {block->memory, block, &release, c10::Device(DEVICE, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
};

Memory memory;
REGISTER_ALLOCATOR(DEVICE, &memory);

// ---- the current device -------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {DEVICE, current}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < device_count(), "device ", int(device.index()), " is not there");
    if (device.has_index()) current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(DEVICE_KEY, Guard);

// No `override`: torch 2.3 asks for none of these yet.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return true; }
  c10::DeviceIndex deviceCount() const { return device_count(); }
  c10::DeviceIndex getCurrentDevice() const { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const { current = index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const {
    return std::exchange(current, index);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const {
    return std::exchange(current, index);
  }
};

// ---- the few operations that only a device itself can do ----------------------------------

const c10::DispatchKeySet KEYS(c10::DispatchKey::DEVICE_KEY);

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(DEVICE, current)));
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(DEVICE, current)));
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS,
                                           c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.device().type() != DEVICE) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                       tensor.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  const bool converts = self.scalar_type() != to.scalar_type();
  if (converts && self.device().type() == DEVICE && to.device().type() == DEVICE) {
    if (is_wide(self)) report("aten::_copy_from", self);
    if (is_wide(to)) report("aten::_copy_from", to);
  }
  on_host(to).copy_(on_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset.has_value()) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size),
                                           C10_AS_INTARRAYREF_SLOW(stride), start);
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size,
                         c10::SymIntArrayRef stride) {
  return as_strided(self, size, stride, std::nullopt);
}

const at::Tensor& resize_(const at::Tensor& self, c10::SymIntArrayRef size,
                          std::optional<at::MemoryFormat>) {
  // Host memory: the CPU's own way fits, with the allocator that the storage remembers.
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size),
                               std::nullopt);
  return self;
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                       c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  std::optional<at::Tensor> offset;
  if (bias.has_value() && bias->defined()) offset = bias->cpu();
  return at::convolution_symint(input.cpu(), weight.cpu(), offset, stride, padding, dilation,
                                transposed, output_padding, std::move(groups))
      .to(input.device());
}

// Indices, masks used as indices and all arithmetic on 64-bit numbers. A mask may lie on the host:
// the device is handed it, or the 64-bit places that it stands for.
void look_at(const std::string& operation, const at::Tensor& tensor) {
  if (!tensor.defined()) return;
  const bool is_mask = operation == "aten::index" && tensor.scalar_type() == at::kBool;
  if (is_wide(tensor) || is_mask) report(operation, tensor);
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) {
      look_at(name, value.toTensor());
    } else if (value.isList()) {  // of tensors, or of tensors and nothing: the indices of a[i, :]
      for (const c10::IValue& item : value.toListRef()) {
        if (item.isTensor()) look_at(name, item.toTensor());
      }
    }
  }
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, DEVICE_KEY, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize_);
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("convolution_overrideable", &convolution);
  // Without a kernel of the device's own torch decomposes it, and trips over channels-last inputs.
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(_, DEVICE_KEY, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("watch", [](py::object callback) { watcher = new py::object(std::move(callback)); });
  m.def("device_count", [] { return int(device_count()); });
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int index) { Guard().setDevice({DEVICE, c10::DeviceIndex(index)}); });
  m.def("allocated", [] { return allocated.load(); });
  m.def("peak", [] { return peak.load(); });
  m.def("reset_peak", [] { peak = allocated.load(); });
}
