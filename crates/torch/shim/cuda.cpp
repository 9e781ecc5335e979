// libtorch's CUDA, loaded when a run asks for it. Only headers that need no CUDA toolkit: what libtorch_cuda.so registers with the
// device-generic interfaces of c10 is all that is used of it.
#include "shim.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

template <typename Body>
char* guarded(Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

// Where libtorch_cpu.so is, with a slash behind; empty if the system does not say.
std::string library_folder() {
  Dl_info info;
  // Not the address of a function, which may be one of this binary's stubs: something that only the library has.
  void* symbol = dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv");
  if (!symbol || !dladdr(symbol, &info) || !info.dli_fname) return {};
  const std::string path(info.dli_fname);
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? std::string() : path.substr(0, slash + 1);
}

c10::DeviceAllocator& allocator() { return *c10::getDeviceAllocator(CUDA); }

}  // namespace

extern "C" {

char* sw_library_folder() {
  const std::string folder = library_folder();
  return folder.empty() ? nullptr : strdup(folder.c_str());
}

char* sw_cuda_load(int32_t* num_gpus) {
  return guarded([&] {
    // For ever: its operations are registered for the process.
    if (!dlopen((library_folder() + "libtorch_cuda.so").c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
    *num_gpus = c10::impl::VirtualGuardImpl(CUDA).deviceCount();
  });
}

char* sw_cuda_use_stream(int32_t ordinal, void* stream) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(CUDA);
    c10::impl::VirtualGuardImpl guard(CUDA);
    const c10::Device device(CUDA, static_cast<c10::DeviceIndex>(ordinal));
    guard.setDevice(device);
    // A stream that is not libtorch's own has its address for an id.
    guard.exchangeStream(c10::Stream(c10::Stream::UNSAFE, device, reinterpret_cast<c10::StreamId>(stream)));
    if (guard.getStreamNativeHandle(guard.getStream(device)) != stream) {
      throw std::runtime_error("the stream was not taken");
    }
  });
}

char* sw_cuda_upload(at::Tensor* tensor, int32_t ordinal, at::Tensor** result) {
  return guarded([&] {
    const c10::Device device(CUDA, static_cast<c10::DeviceIndex>(ordinal));
    *result = new at::Tensor(tensor->pin_memory().to(device, tensor->scalar_type(), /*non_blocking=*/true));
  });
}

char* sw_cuda_set_deterministic(uint8_t on) {
  return guarded([&] {
    at::globalContext().setDeterministicAlgorithms(on != 0, /*warn_only=*/false);
    // Nobody here reads what was not written: filling every new tensor would be a pass for nothing.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  });
}

char* sw_cuda_set_cudnn_attention(uint8_t on) {
  return guarded([&] { at::globalContext().setSDPUseCuDNN(on != 0); });
}

char* sw_cuda_memory(int32_t ordinal, SwCudaMemory* memory) {
  return guarded([&] {
    // Before, the allocator knows no device.
    at::globalContext().lazyInitDevice(CUDA);
    const auto stats = allocator().getDeviceStats(static_cast<c10::DeviceIndex>(ordinal));
    const auto aggregate = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto& allocated = stats.allocated_bytes[aggregate];
    const auto& reserved = stats.reserved_bytes[aggregate];
    *memory = {static_cast<uint64_t>(allocated.current), static_cast<uint64_t>(allocated.peak),
               static_cast<uint64_t>(reserved.current), static_cast<uint64_t>(reserved.peak),
               static_cast<uint64_t>(stats.num_device_alloc)};
  });
}

char* sw_cuda_reset_peak(int32_t ordinal) {
  return guarded([&] {
    at::globalContext().lazyInitDevice(CUDA);
    allocator().resetPeakStats(static_cast<c10::DeviceIndex>(ordinal));
  });
}

char* sw_cuda_release_cached() {
  return guarded([&] { allocator().emptyCache(); });
}
}
