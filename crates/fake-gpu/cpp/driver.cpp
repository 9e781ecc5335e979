// A CUDA driver without a GPU, for tests: the entry points of libcuda over host memory, as unhelpful as the rules
// of streams and events allow.
//
// - Work runs late: a stream is a queue, and its work runs when something waits for it, or when the seeded
//   adversary feels like it, in any order that streams and events leave open. There are no threads: work runs
//   within the caller's next call, under one lock, so a seed gives the same order again.
// - Device addresses are real reserved addresses without access: a host that touches one faults. The bytes are kept
//   elsewhere. Freed addresses are never used again, and freed pinned memory loses its access too. For libraries that
//   compute on a device's memory in the host's threads, `fake_host_access` gives the addresses access.
// - Work that meets memory which is freed, too small or of the wrong kind is a violation, written down for the test.
// - The fake counts what is alive, and fails the n-th call when told to.
// - It knows a few kernels of its own by name, and runs those of the tree, compiled for the host: see host.h. Pointers in their
//   structures are device addresses, for which it puts those of the bytes.
//
// Where the real driver may do one of two things, this does the one that hurts: freeing memory waits for nothing,
// asynchronous copies from pageable memory read late, an error that a destructor reports leaves the object destroyed.

#include "machine.h"

namespace {

// Every entry point begins here: the adversary has its turn, and the n-th call fails.
int begin(bool needs_context = false) {
    Fake& f = fake();
    take_turn();
    f.calls++;
    if (f.calls == f.fail_at) return f.fail_with;
    if (!f.initialised) return NOT_INITIALIZED;
    if (needs_context) {
        auto& stack = f.current[std::this_thread::get_id()];
        if (stack.empty()) {
            violation("a call without a current context");
            return INVALID_CONTEXT;
        }
        return f.devices[stack.back() - 1].sticky;
    }
    return OK;
}

int current_device() { return fake().current[std::this_thread::get_id()].back() - 1; }

#define BEGIN(context)                               \
    std::unique_lock<std::mutex> guard(fake().lock); \
    if (int code = begin(context)) return CUresult(code)
// For destructors: what they destroy is destroyed, whatever they report.
#define BEGIN_DESTRUCTOR                             \
    std::lock_guard<std::mutex> guard(fake().lock);  \
    int code = begin(true)

bool known(int device) { return device >= 0 && size_t(device) < fake().devices.size(); }

CUstream_fake* stream_of(CUstream handle) {
    auto* stream = reinterpret_cast<CUstream_fake*>(handle);
    if (!fake().streams.count(stream) || stream->destroyed) {
        violation("a call with an unknown stream");
        return nullptr;
    }
    if (stream->device != current_device()) {
        violation("a stream is used in another context than its own");
        return nullptr;
    }
    return stream;
}

Event* event_of(CUevent handle) {
    auto* event = reinterpret_cast<Event*>(handle);
    if (fake().events.count(event)) return event;
    violation("a call with an unknown event");
    return nullptr;
}

int enqueue(CUstream handle, Operation op) {
    CUstream_fake* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->queue.push_back(std::move(op));
    if (fake().eagerness == 2) run_all();
    fake().changed.notify_all();
    return OK;
}

int copy(u64 target, u64 source, size_t bytes, CUstream stream) {
    Operation op(Operation::COPY);
    op.target = target, op.source = source, op.bytes = bytes;
    return enqueue(stream, std::move(op));
}

// Addresses that nobody else gets, without access to them.
unsigned char* reserve(size_t bytes) {
    void* reserved = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return reserved == MAP_FAILED ? nullptr : static_cast<unsigned char*>(reserved);
}

// Gives access to a block that begins here. New memory holds anything.
bool open_up(unsigned char* data, size_t bytes) {
    if (mprotect(data, whole_pages(bytes), PROT_READ | PROT_WRITE)) return false;
    memset(data, 0xCD, bytes);
    memset(data + bytes, GUARD, whole_pages(bytes) - bytes);
    return true;
}

// Takes access and memory away from a block, not its addresses.
void close_off(unsigned char* data, size_t bytes) {
    mprotect(data, whole_pages(bytes), PROT_NONE);
    madvise(data, whole_pages(bytes), MADV_DONTNEED);
}

bool is_device_memory(u64 address, size_t bytes) {
    if (fake().host_access) return true;  // the host's memory stands in for a device's
    auto next = fake().blocks.upper_bound(address);
    if (next == fake().blocks.begin()) return false;
    auto& [start, block] = *std::prev(next);
    return block.device >= 0 && !block.freed && address - start < block.bytes && bytes <= block.bytes - (address - start);
}

}  // namespace

extern "C" {

CUresult CUDAAPI cuInit(unsigned int flags) {
    std::lock_guard<std::mutex> guard(fake().lock);
    Fake& f = fake();
    f.initialised = true;
    if (int code = begin()) return CUresult(code);
    return CUresult(flags ? INVALID_VALUE : f.devices.empty() ? NO_DEVICE : OK);
}

CUresult CUDAAPI cuDriverGetVersion(int* version) {
    *version = fake().version;
    return CUresult(OK);
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char** text) {
    switch (int(error)) {
        case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case ILLEGAL_ADDRESS: *text = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        case LAUNCH_FAILED: *text = "CUDA_ERROR_LAUNCH_FAILED"; break;
        case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        default: *text = nullptr; return CUresult(INVALID_VALUE);
    }
    return CUresult(OK);
}

CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
    switch (int(error)) {
        case OUT_OF_MEMORY: *text = "out of memory"; break;
        case ILLEGAL_ADDRESS: *text = "an illegal memory access was encountered"; break;
        case LAUNCH_FAILED: *text = "unspecified launch failure"; break;
        case INVALID_VALUE: *text = "invalid argument"; break;
        default: *text = nullptr; return CUresult(INVALID_VALUE);
    }
    return CUresult(OK);
}

CUresult CUDAAPI cuDeviceGetCount(int* count) {
    BEGIN(false);
    *count = int(fake().devices.size());
    return CUresult(OK);
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
    BEGIN(false);
    if (!known(ordinal)) return CUresult(INVALID_DEVICE);
    *device = ordinal;
    return CUresult(OK);
}

CUresult CUDAAPI cuDeviceGetName(char* name, int length, CUdevice device) {
    BEGIN(false);
    if (!known(device)) return CUresult(INVALID_DEVICE);
    strncpy(name, fake().devices[device].name.c_str(), size_t(length));
    name[length - 1] = 0;
    return CUresult(OK);
}

CUresult CUDAAPI cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
    BEGIN(false);
    if (!known(device)) return CUresult(INVALID_DEVICE);
    snprintf(id, size_t(length), "0000:%02X:00.0", device + 15);
    return CUresult(OK);
}

CUresult CUDAAPI cuDeviceTotalMem(size_t* bytes, CUdevice device) {
    BEGIN(false);
    if (!known(device)) return CUresult(INVALID_DEVICE);
    *bytes = fake().devices[device].total;
    return CUresult(OK);
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
    BEGIN(false);
    if (!known(device)) return CUresult(INVALID_DEVICE);
    switch (int(which)) {
        case 16: *value = 132; break;
        case 75: *value = fake().devices[device].major; break;
        case 76: *value = fake().devices[device].minor; break;
        default: return CUresult(INVALID_VALUE);
    }
    return CUresult(OK);
}

CUresult CUDAAPI cuDeviceCanAccessPeer(int* can, CUdevice a, CUdevice b) {
    BEGIN(false);
    if (!known(a) || !known(b)) return CUresult(INVALID_DEVICE);
    *can = fake().peers && a != b;
    return CUresult(OK);
}

CUresult CUDAAPI cuDeviceGetP2PAttribute(int* value, CUdevice_P2PAttribute which, CUdevice a, CUdevice b) {
    BEGIN(false);
    if (!known(a) || !known(b) || a == b) return CUresult(INVALID_DEVICE);
    switch (int(which)) {
        case 1: *value = 0; break;
        case 3: *value = 1; break;
        default: return CUresult(INVALID_VALUE);
    }
    return CUresult(OK);
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    BEGIN(false);
    if (!known(device)) return CUresult(INVALID_DEVICE);
    fake().devices[device].retained++;
    *context = reinterpret_cast<CUcontext>(intptr_t(device + 1));
    return CUresult(OK);
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) {
    std::lock_guard<std::mutex> guard(fake().lock);
    int code = begin();
    if (!known(device) || fake().devices[device].retained == 0) {
        violation("a context is released that was not retained");
        return CUresult(INVALID_CONTEXT);
    }
    fake().devices[device].retained--;
    return CUresult(code);
}

CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
    BEGIN(false);
    int device = int(intptr_t(context)) - 1;
    if (!known(device) || fake().devices[device].retained == 0) {
        violation("a context is entered that is not retained");
        return CUresult(INVALID_CONTEXT);
    }
    fake().current[std::this_thread::get_id()].push_back(device + 1);
    return CUresult(OK);
}

CUresult CUDAAPI cuCtxPopCurrent(CUcontext* context) {
    std::lock_guard<std::mutex> guard(fake().lock);
    int code = begin();
    auto& stack = fake().current[std::this_thread::get_id()];
    if (stack.empty()) {
        violation("a context is left that was not entered");
        return CUresult(INVALID_CONTEXT);
    }
    *context = reinterpret_cast<CUcontext>(intptr_t(stack.back()));
    stack.pop_back();
    return CUresult(code);
}

CUresult CUDAAPI cuCtxSynchronize(void) {
    BEGIN(true);
    int device = current_device();
    auto streams = fake().streams;
    for (auto* stream : streams)
        if (fake().streams.count(stream) && stream->device == device)
            wait_until(guard, stream, [] { return false; });
    return CUresult(fake().devices[device].sticky);
}

CUresult CUDAAPI cuCtxEnablePeerAccess(CUcontext peer, unsigned int flags) {
    BEGIN(true);
    if (flags) return CUresult(INVALID_VALUE);
    if (!fake().peers) return CUresult(PEER_UNSUPPORTED);
    bool fresh = fake().enabled.insert({current_device(), int(intptr_t(peer)) - 1}).second;
    return CUresult(fresh ? OK : PEER_ALREADY);
}

CUresult CUDAAPI cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    BEGIN(true);
    *least = 0, *greatest = -5;
    return CUresult(OK);
}

CUresult CUDAAPI cuStreamCreateWithPriority(CUstream* handle, unsigned int flags, int priority) {
    BEGIN(true);
    if (flags != 1 || priority > 0 || priority < -5) return CUresult(INVALID_VALUE);
    auto* stream = new CUstream_fake{current_device(), {}};
    fake().streams.insert(stream);
    *handle = reinterpret_cast<CUstream>(stream);
    return CUresult(OK);
}

CUresult CUDAAPI cuStreamDestroy(CUstream handle) {
    BEGIN_DESTRUCTOR;
    if (code == INVALID_CONTEXT) return CUresult(code);
    CUstream_fake* stream = stream_of(handle);
    if (!stream) return CUresult(INVALID_HANDLE);
    stream->destroyed = true;
    fake().graveyard.emplace_back(stream);
    if (stream->queue.empty()) fake().streams.erase(stream);
    return CUresult(code);
}

CUresult CUDAAPI cuStreamSynchronize(CUstream handle) {
    BEGIN(true);
    CUstream_fake* stream = stream_of(handle);
    if (!stream) return CUresult(INVALID_HANDLE);
    wait_until(guard, stream, [] { return false; });
    return CUresult(fake().devices[stream->device].sticky);
}

CUresult CUDAAPI cuStreamQuery(CUstream handle) {
    BEGIN(true);
    CUstream_fake* stream = stream_of(handle);
    if (!stream) return CUresult(INVALID_HANDLE);
    if (stream->queue.empty()) return CUresult(OK);
    run_any();  // asking again and again gets there
    return CUresult(NOT_READY);
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent handle, unsigned int flags) {
    BEGIN(true);
    Event* event = event_of(handle);
    if (!event || flags) return CUresult(INVALID_HANDLE);
    if (!event->record) return CUresult(OK);
    Operation op(Operation::WAIT);
    op.record = event->record;
    auto record = event->record;
    const int code = enqueue(stream, std::move(op));
    // Whoever computes on a device's memory in the host's threads does so at once, and not when the stream has waited.
    if (fake().host_access && !record->done) wait_until(guard, record->stream, [&] { return record->done; });
    return CUresult(code);
}

CUresult CUDAAPI cuEventCreate(CUevent* handle, unsigned int flags) {
    BEGIN(true);
    if (flags != 0 && flags != 2) return CUresult(INVALID_VALUE);
    auto* event = new Event{current_device(), flags == 0, nullptr};
    fake().events.insert(event);
    *handle = reinterpret_cast<CUevent>(event);
    return CUresult(OK);
}

CUresult CUDAAPI cuEventDestroy(CUevent handle) {
    BEGIN_DESTRUCTOR;
    if (code == INVALID_CONTEXT) return CUresult(code);
    Event* event = event_of(handle);
    if (!event) return CUresult(INVALID_HANDLE);
    fake().events.erase(event);
    delete event;
    return CUresult(code);
}

CUresult CUDAAPI cuEventRecord(CUevent handle, CUstream stream) {
    BEGIN(true);
    Event* event = event_of(handle);
    if (!event) return CUresult(INVALID_HANDLE);
    if (event->device != current_device()) {
        violation("an event is recorded in another context than its own");
        return CUresult(INVALID_HANDLE);
    }
    auto record = std::make_shared<Record>();
    record->stream = reinterpret_cast<CUstream_fake*>(stream);
    Operation op(Operation::RECORD);
    op.record = record;
    int queued = enqueue(stream, std::move(op));
    if (queued == OK) event->record = record;
    return CUresult(queued);
}

CUresult CUDAAPI cuEventQuery(CUevent handle) {
    BEGIN(true);
    Event* event = event_of(handle);
    if (!event) return CUresult(INVALID_HANDLE);
    if (!event->record || event->record->done) return CUresult(OK);
    run_any();
    return CUresult(NOT_READY);
}

CUresult CUDAAPI cuEventSynchronize(CUevent handle) {
    BEGIN(true);
    Event* event = event_of(handle);
    if (!event) return CUresult(INVALID_HANDLE);
    auto record = event->record;
    int device = event->device;
    if (record && !record->done) wait_until(guard, record->stream, [&] { return record->done; });
    return CUresult(fake().devices[device].sticky);
}

CUresult CUDAAPI cuEventElapsedTime(float* elapsed, CUevent from, CUevent to) {
    BEGIN(true);
    Event *a = event_of(from), *b = event_of(to);
    if (!a || !b || !a->timed || !b->timed || !a->record || !b->record) return CUresult(INVALID_HANDLE);
    if (!a->record->done || !b->record->done) return CUresult(NOT_READY);
    *elapsed = float(b->record->time - a->record->time);
    return CUresult(OK);
}

CUresult CUDAAPI cuMemGetInfo(size_t* free, size_t* total) {
    BEGIN(true);
    Device& device = fake().devices[current_device()];
    *total = device.total, *free = device.total - device.used;
    return CUresult(OK);
}

CUresult CUDAAPI cuMemAlloc(CUdeviceptr* address, size_t bytes) {
    BEGIN(true);
    Device& device = fake().devices[current_device()];
    if (bytes == 0) return CUresult(INVALID_VALUE);
    if (bytes > device.total - device.used) return CUresult(OUT_OF_MEMORY);
    // A page lies between two blocks: an empty view at the end of one is not in the next.
    auto* reserved = reserve(whole_pages(bytes) + PAGE);
    auto* data = reserved && !fake().host_access ? reserve(whole_pages(bytes) + 2 * PAGE) : reserved;
    if (!data) return CUresult(OUT_OF_MEMORY);
    if (data != reserved) data += PAGE;
    if (!open_up(data, bytes)) return CUresult(OUT_OF_MEMORY);
    device.used += bytes;
    *address = CUdeviceptr(reserved);
    fake().blocks[u64(*address)] = Block{current_device(), bytes, data};
    return CUresult(OK);
}

CUresult CUDAAPI cuMemFree(CUdeviceptr address) {
    BEGIN_DESTRUCTOR;
    if (code == INVALID_CONTEXT) return CUresult(code);
    auto found = fake().blocks.find(address);
    if (found == fake().blocks.end() || found->second.freed || found->second.device != current_device()) {
        violation("memory is freed that is not there");
        return CUresult(INVALID_VALUE);
    }
    Block& block = found->second;
    if (!guard_stands(block)) violation("something wrote past the end of device memory");
    block.freed = true;
    fake().devices[block.device].used -= block.bytes;
    if (u64(block.data) == address) close_off(block.data, block.bytes);
    else munmap(block.data - PAGE, whole_pages(block.bytes) + 2 * PAGE);
    block.data = nullptr;
    return CUresult(code);
}

CUresult CUDAAPI cuMemHostAlloc(void** pointer, size_t bytes, unsigned int flags) {
    BEGIN(true);
    if (bytes == 0 || flags != 1) return CUresult(INVALID_VALUE);
    if (bytes > fake().pinned_limit - fake().pinned) return CUresult(OUT_OF_MEMORY);
    auto* mapped = reserve(whole_pages(bytes) + PAGE);
    if (!mapped || !open_up(mapped, bytes)) return CUresult(OUT_OF_MEMORY);
    fake().pinned += bytes;
    fake().blocks[u64(mapped)] = Block{-1, bytes, mapped};
    *pointer = mapped;
    return CUresult(OK);
}

CUresult CUDAAPI cuMemFreeHost(void* pointer) {
    BEGIN_DESTRUCTOR;
    if (code == INVALID_CONTEXT) return CUresult(code);
    auto found = fake().blocks.find(u64(pointer));
    if (found == fake().blocks.end() || found->second.freed || found->second.device != -1) {
        violation("pinned memory is freed that is not there");
        return CUresult(INVALID_VALUE);
    }
    if (!guard_stands(found->second)) violation("something wrote past the end of pinned memory");
    found->second.freed = true;
    fake().pinned -= found->second.bytes;
    close_off(found->second.data, found->second.bytes);
    return CUresult(code);
}

CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr target, const void* source, size_t bytes, CUstream stream) {
    BEGIN(true);
    if (!is_device_memory(target, bytes)) return CUresult(INVALID_VALUE);
    return CUresult(copy(target, u64(source), bytes, stream));
}

CUresult CUDAAPI cuMemcpyDtoHAsync(void* target, CUdeviceptr source, size_t bytes, CUstream stream) {
    BEGIN(true);
    if (!is_device_memory(source, bytes)) return CUresult(INVALID_VALUE);
    return CUresult(copy(u64(target), source, bytes, stream));
}

CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr target, CUdeviceptr source, size_t bytes, CUstream stream) {
    BEGIN(true);
    if (!is_device_memory(source, bytes) || !is_device_memory(target, bytes)) return CUresult(INVALID_VALUE);
    return CUresult(copy(target, source, bytes, stream));
}

CUresult CUDAAPI cuMemcpyPeerAsync(CUdeviceptr target, CUcontext target_context, CUdeviceptr source,
                                   CUcontext source_context, size_t bytes, CUstream stream) {
    BEGIN(true);
    auto owner = [](u64 address) { return std::prev(fake().blocks.upper_bound(address))->second.device + 1; };
    if (!is_device_memory(source, bytes) || !is_device_memory(target, bytes) ||
        owner(source) != intptr_t(source_context) || owner(target) != intptr_t(target_context))
        return CUresult(INVALID_VALUE);
    return CUresult(copy(target, source, bytes, stream));
}

CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr target, unsigned char byte, size_t bytes, CUstream stream) {
    BEGIN(true);
    if (!is_device_memory(target, bytes)) return CUresult(INVALID_VALUE);
    Operation op(Operation::FILL);
    op.target = target, op.bytes = bytes, op.byte = byte;
    return CUresult(enqueue(stream, std::move(op)));
}

// An image is an ELF header of CUDA's machine, then the names of its kernels with a zero after each, then a zero.
CUresult CUDAAPI cuModuleLoadData(CUmodule* handle, const void* image) {
    BEGIN(true);
    auto* bytes = static_cast<const char*>(image);
    if (memcmp(bytes, "\x7f" "ELF", 4) || static_cast<unsigned char>(bytes[18]) != 190) return CUresult(INVALID_IMAGE);
    auto* module = new Module{current_device(), {}, {}};
    for (const char* name = bytes + 64; *name; name += strlen(name) + 1) module->names.insert(name);
    fake().modules.insert(module);
    *handle = reinterpret_cast<CUmodule>(module);
    return CUresult(OK);
}

CUresult CUDAAPI cuModuleUnload(CUmodule handle) {
    BEGIN_DESTRUCTOR;
    if (code == INVALID_CONTEXT) return CUresult(code);
    auto* module = reinterpret_cast<Module*>(handle);
    if (!fake().modules.erase(module)) {
        violation("a module is unloaded that is not there");
        return CUresult(INVALID_HANDLE);
    }
    module->unloaded = true;  // kept: work in flight may point at it
    return CUresult(code);
}

CUresult CUDAAPI cuModuleGetFunction(CUfunction* handle, CUmodule module_handle, const char* name) {
    BEGIN(true);
    auto* module = reinterpret_cast<Module*>(module_handle);
    if (!fake().modules.count(module)) return CUresult(INVALID_HANDLE);
    if (!module->names.count(name)) return CUresult(NOT_FOUND);
    auto found = [&](int own, HostKernel compiled, std::vector<size_t> parameters) {
        module->functions.emplace_back(new Function{module, name, own, compiled, std::move(parameters)});
        *handle = reinterpret_cast<CUfunction>(module->functions.back().get());
        return CUresult(OK);
    };
    for (size_t i = 0; i < KERNELS.size(); i++)
        if (!strcmp(KERNELS[i].name, name)) return found(int(i), nullptr, KERNELS[i].parameters);
    size_t bytes = 0;
    HostKernel compiled = fake().find_kernel ? fake().find_kernel(name, &bytes) : nullptr;
    return compiled ? found(-1, compiled, {bytes}) : CUresult(NOT_FOUND);
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction handle, CUfunction_attribute which, int value) {
    BEGIN(true);
    if (int(which) != 8 || value < 0 || value > 227 << 10) return CUresult(INVALID_VALUE);
    reinterpret_cast<Function*>(handle)->shared_limit = value;
    return CUresult(OK);
}

CUresult CUDAAPI cuFuncGetParamInfo(CUfunction handle, size_t index, size_t* offset, size_t* size) {
    BEGIN(true);
    auto& sizes = reinterpret_cast<Function*>(handle)->parameters;
    if (index >= sizes.size()) return CUresult(INVALID_VALUE);
    *offset = 0, *size = sizes[index];
    for (size_t i = 0; i < index; i++) *offset += sizes[i];
    return CUresult(OK);
}

CUresult CUDAAPI cuLaunchKernel(CUfunction handle, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx,
                                unsigned int by, unsigned int bz, unsigned int shared, CUstream stream,
                                void** arguments, void** extra) {
    BEGIN(true);
    auto* function = reinterpret_cast<Function*>(handle);
    if (extra || !gx || !gy || !gz || !bx || !by || !bz || u64(bx) * by * bz > 1024 ||
        int(shared) > function->shared_limit || function->module->device != current_device())
        return CUresult(INVALID_VALUE);
    // Kernels of the tree are for blocks of one dimension, and compiled for at most so many threads (numbers.cuh).
    if (function->compiled && (gy != 1 || gz != 1 || by != 1 || bz != 1 || bx > 512)) return CUresult(INVALID_VALUE);
    Operation op(Operation::KERNEL);
    op.function = function;
    op.grid = gx, op.threads = bx, op.shared = shared;
    auto& sizes = function->parameters;
    for (size_t i = 0; i < sizes.size(); i++) {
        size_t start = op.arguments.size();
        op.arguments.resize(start + (sizes[i] + 7) / 8);
        memcpy(op.arguments.data() + start, arguments[i], sizes[i]);
    }
    return CUresult(enqueue(stream, std::move(op)));
}

// What tests call.

void fake_driver_version(int version) { fake().version = version; }
void fake_devices(int count) { fake().devices.assign(size_t(count), Device{}); }
void fake_device(int ordinal, const char* name, int major, int minor, size_t total) {
    Device& device = fake().devices[size_t(ordinal)];
    device.name = name, device.major = major, device.minor = minor, device.total = total;
}
void fake_peers(int can) { fake().peers = can != 0; }
// The host reaches device memory that is allocated from now on, at its address, and all work runs at once.
void fake_host_access(void) {
    std::lock_guard<std::mutex> guard(fake().lock);
    fake().host_access = true, fake().eagerness = 2;
    run_all();
}
void fake_kernels(FindKernel find, LaunchKernel launch) { fake().find_kernel = find, fake().launch_kernel = launch; }
void fake_pinned_limit(size_t bytes) { fake().pinned_limit = bytes; }
void fake_adversary(u64 seed, int eagerness) {
    fake().random = seed * 2 + 1;
    for (int i = 0; i < 8; i++) next_random();
    fake().eagerness = eagerness;
}
void fake_fail_at(long calls_from_now, int code) {
    std::lock_guard<std::mutex> guard(fake().lock);
    fake().fail_at = fake().calls + calls_from_now, fake().fail_with = code;
}
long fake_calls(void) {
    std::lock_guard<std::mutex> guard(fake().lock);
    return fake().calls;
}
// Operations that ran so far.
long fake_ran(void) {
    std::lock_guard<std::mutex> guard(fake().lock);
    return fake().ran;
}
// What is alive, and what was done that must not be: empty if all is well and nothing is alive.
const char* fake_report(void) {
    std::lock_guard<std::mutex> guard(fake().lock);
    Fake& f = fake();
    run_all();  // what was left behind shows what it would have done
    f.report.clear();
    for (auto& what : f.violations) f.report += what + "; ";
    auto count = [&](const char* what, size_t number) {
        if (number) f.report += std::to_string(number) + " " + what + " alive; ";
    };
    size_t memory = 0, pinned = 0, contexts = 0, streams = 0, entered = 0;
    for (auto& [address, block] : f.blocks) if (!block.freed) (block.device < 0 ? pinned : memory)++;
    for (auto& device : f.devices) contexts += size_t(device.retained);
    for (auto* stream : f.streams) streams += !stream->destroyed;
    for (auto& [thread, stack] : f.current) entered += stack.size();
    count("device allocations", memory), count("pinned allocations", pinned), count("contexts", contexts);
    count("streams", streams), count("events", f.events.size()), count("modules", f.modules.size());
    count("entered contexts", entered), count("communicators", size_t(f.communicators));
    return f.report.c_str();
}
// Device allocations and pinned ones that were ever made.
long fake_allocations(void) {
    std::lock_guard<std::mutex> guard(fake().lock);
    return long(fake().blocks.size());
}
}
