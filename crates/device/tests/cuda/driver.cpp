// A CUDA driver without a GPU, for tests: the entry points of libcuda over host memory, as unhelpful as the rules
// of streams and events allow.
//
// - Work runs late: a stream is a queue, and its work runs when something waits for it, or when the seeded
//   adversary feels like it, in any order that streams and events leave open. There are no threads: work runs
//   within the caller's next call, under one lock, so a seed gives the same order again.
// - Device addresses are real reserved addresses without access: a host that touches one faults. The bytes are kept
//   elsewhere. Freed addresses are never used again, and freed pinned memory loses its access too.
// - Work that meets memory which is freed, too small or of the wrong kind is a violation, written down for the test.
// - The fake counts what is alive, fails the n-th call when told to, and knows a few kernels by name.
//
// Where the real driver may do one of two things, this does the one that hurts: freeing memory waits for nothing,
// asynchronous copies from pageable memory read late, an error that a destructor reports leaves the object destroyed.

#ifdef REAL_CUDA_H  // To hold our declarations against NVIDIA's: -DREAL_CUDA_H='<cuda.h>'.
#include REAL_CUDA_H
#else
typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st* CUcontext;
typedef struct CUstream_st* CUstream;
typedef struct CUevent_st* CUevent;
typedef struct CUmod_st* CUmodule;
typedef struct CUfunc_st* CUfunction;
typedef int CUdevice_attribute;
typedef int CUdevice_P2PAttribute;
typedef int CUfunction_attribute;
#define CUDAAPI
#define cuDeviceTotalMem cuDeviceTotalMem_v2
#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuCtxPushCurrent cuCtxPushCurrent_v2
#define cuCtxPopCurrent cuCtxPopCurrent_v2
#define cuStreamDestroy cuStreamDestroy_v2
#define cuEventDestroy cuEventDestroy_v2
#define cuMemGetInfo cuMemGetInfo_v2
#define cuMemAlloc cuMemAlloc_v2
#define cuMemFree cuMemFree_v2
#define cuMemcpyHtoDAsync cuMemcpyHtoDAsync_v2
#define cuMemcpyDtoHAsync cuMemcpyDtoHAsync_v2
#define cuMemcpyDtoDAsync cuMemcpyDtoDAsync_v2
#endif
#undef cuEventElapsedTime  // The plain symbol is the one we load.

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

using u64 = uint64_t;

enum : int {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_IMAGE = 200, INVALID_CONTEXT = 201, PEER_UNSUPPORTED = 217, INVALID_HANDLE = 400, NOT_FOUND = 500,
    NOT_READY = 600, ILLEGAL_ADDRESS = 700, PEER_ALREADY = 704, LAUNCH_FAILED = 719,
};

struct Device {
    std::string name = "Fake GPU";
    int major = 9, minor = 0;
    size_t total = size_t(1) << 30, used = 0;
    int retained = 0;
    int sticky = OK;  // the error of a failed kernel: from then on every call returns it
};

// A place where an event was recorded.
struct Record {
    struct CUstream_fake* stream = nullptr;
    bool done = false;
    double time = 0;
};

struct Operation {
    enum Kind { COPY, FILL, KERNEL, RECORD, WAIT } kind;
    explicit Operation(Kind kind) : kind(kind) {}
    u64 target = 0, source = 0;
    size_t bytes = 0;
    unsigned char byte = 0;
    std::shared_ptr<Record> record;
    struct Function* function = nullptr;
    std::vector<u64> arguments;
};

struct CUstream_fake {
    int device;
    std::deque<Operation> queue;
    bool destroyed = false;
};

struct Event {
    int device;
    bool timed;
    std::shared_ptr<Record> record;
};

struct Block {
    int device;  // -1: pinned host memory
    size_t bytes;
    unsigned char* data;
    bool freed = false;
};

struct Module;
struct Function {
    Module* module;
    int kernel;
    int shared_limit = 48 << 10;
};
struct Module {
    int device;
    std::vector<std::unique_ptr<Function>> functions;
    std::set<std::string> names;
    bool unloaded = false;
};

struct Kernel {
    const char* name;
    std::vector<size_t> parameters;
};
const std::vector<Kernel> KERNELS = {
    {"add", {8, 8, 8, 8}},   // a, b, sum: f32; numel: u64
    {"fill", {8, 4, 8}},     // out: f32; value: f32; numel: u64
    {"fail", {}},            // accesses an illegal address
    {"scale_small", {8, 1, 2, 4, 4}},  // out: f32; u8, u16, i32: their sum is added; numel: u32
};

struct Fake {
    std::mutex lock;
    int version = 13000;
    bool initialised = false, peers = true;
    std::vector<Device> devices = std::vector<Device>(1);
    std::map<std::thread::id, std::vector<int>> current;  // contexts: device + 1
    std::set<CUstream_fake*> streams;
    std::set<Event*> events;
    std::set<Module*> modules;
    std::map<u64, Block> blocks;  // by address, freed ones too
    std::set<std::pair<int, int>> enabled;
    std::vector<std::unique_ptr<CUstream_fake>> graveyard;  // destroyed streams with work left
    std::vector<std::string> violations;
    std::string report;
    u64 random = 1;
    int eagerness = 0;  // 0: only what is waited for runs; 1: more, at random; 2: at once
    long calls = 0, fail_at = -1;
    int fail_with = OK;
    size_t pinned_limit = size_t(1) << 30, pinned = 0;
    double clock = 0;
    long ran = 0;
};

Fake& fake() {
    static Fake* instance = new Fake;
    return *instance;
}

u64 next_random() {
    u64& x = fake().random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x * 0x2545F4914F6CDD1Dull >> 16;
}

void violation(const std::string& what) { fake().violations.push_back(what); }

// The bytes behind an address, if `bytes` of them are in one live block; pageable host memory is as it is.
unsigned char* resolve(u64 address, size_t bytes, const char* what, bool no_pageable) {
    auto next = fake().blocks.upper_bound(address);
    if (next != fake().blocks.begin()) {
        auto& [start, block] = *std::prev(next);
        if (address - start <= block.bytes && bytes <= block.bytes - (address - start)) {
            if (block.freed) {
                violation(std::string(what) + " uses freed memory");
                return nullptr;
            }
            return block.data + (address - start);
        }
        if (address - start < block.bytes) {
            violation(std::string(what) + " runs past the end of its memory");
            return nullptr;
        }
    }
    if (no_pageable) {
        violation(std::string(what) + " uses an unknown address");
        return nullptr;
    }
    return reinterpret_cast<unsigned char*>(address);  // pageable host memory
}

void fail_device(int device, int code) { fake().devices[device].sticky = code; }

void run_kernel(CUstream_fake* stream, Operation& op) {
    if (op.function->module->unloaded) {
        violation("a kernel of an unloaded module runs");
        return;
    }
    const char* name = KERNELS[op.function->kernel].name;
    auto& a = op.arguments;
    auto number = [&](int i) { float f; memcpy(&f, &a[i], 4); return f; };
    auto floats = [&](int i, u64 numel) {
        return reinterpret_cast<float*>(resolve(a[i], numel * 4, name, true));
    };
    switch (op.function->kernel) {
        case 0: {
            float *x = floats(0, a[3]), *y = floats(1, a[3]), *sum = floats(2, a[3]);
            if (x && y && sum) for (u64 i = 0; i < a[3]; i++) sum[i] = x[i] + y[i];
            break;
        }
        case 1: {
            float* out = floats(0, a[2]);
            if (out) for (u64 i = 0; i < a[2]; i++) out[i] = number(1);
            break;
        }
        case 2: fail_device(stream->device, ILLEGAL_ADDRESS); break;
        case 3: {
            uint32_t numel = uint32_t(a[4]);
            float* out = floats(0, numel);
            int added = uint8_t(a[1]) + uint16_t(a[2]) + int32_t(uint32_t(a[3]));
            if (out) for (uint32_t i = 0; i < numel; i++) out[i] += float(added);
            break;
        }
    }
}

// Runs the first operation of a stream that may run.
void run_first(CUstream_fake* stream) {
    Operation op = std::move(stream->queue.front());
    stream->queue.pop_front();
    Fake& f = fake();
    f.clock += 0.001;
    f.ran++;
    bool dead = f.devices[stream->device].sticky != OK;
    switch (op.kind) {
        case Operation::COPY: {
            if (dead) break;
            unsigned char* source = resolve(op.source, op.bytes, "a copy (source)", false);
            unsigned char* target = resolve(op.target, op.bytes, "a copy (target)", false);
            if (source && target) memmove(target, source, op.bytes);
            break;
        }
        case Operation::FILL: {
            if (dead) break;
            unsigned char* target = resolve(op.target, op.bytes, "a fill", true);
            if (target) memset(target, op.byte, op.bytes);
            break;
        }
        case Operation::KERNEL: if (!dead) run_kernel(stream, op); break;
        case Operation::RECORD: op.record->done = true; op.record->time = f.clock; break;
        case Operation::WAIT: break;
    }
    if (stream->destroyed && stream->queue.empty()) f.streams.erase(stream);
}

bool may_run(CUstream_fake* stream) {
    if (stream->queue.empty()) return false;
    Operation& first = stream->queue.front();
    return first.kind != Operation::WAIT || first.record->done;
}

bool run_any() {
    std::vector<CUstream_fake*> ready;
    for (auto* stream : fake().streams) if (may_run(stream)) ready.push_back(stream);
    if (ready.empty()) return false;
    run_first(ready[next_random() % ready.size()]);
    return true;
}

// Runs a stream until `over`, and of the others what it has to wait for. Records come before their waits, so this ends.
void run_until(CUstream_fake* stream, const std::function<bool()>& over) {
    while (!over() && !stream->queue.empty()) {
        if (fake().eagerness == 1 && next_random() % 2) run_any();
        if (over() || stream->queue.empty()) break;
        Operation& first = stream->queue.front();
        if (first.kind == Operation::WAIT && !first.record->done) {
            auto record = first.record;
            run_until(record->stream, [&] { return record->done; });
            if (!record->done) {
                violation("a stream waits for an event that never comes");
                break;
            }
        } else {
            run_first(stream);
        }
    }
}

void run_all() { while (run_any()) {} }

// Every entry point begins here: the adversary has its turn, and the n-th call fails.
int begin(bool needs_context = false) {
    Fake& f = fake();
    if (f.eagerness == 1) for (u64 n = next_random() % 4; n > 0; n--) run_any();
    if (f.eagerness == 2) run_all();
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
    std::lock_guard<std::mutex> guard(fake().lock);  \
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
    return OK;
}

int copy(u64 target, u64 source, size_t bytes, CUstream stream) {
    Operation op(Operation::COPY);
    op.target = target, op.source = source, op.bytes = bytes;
    return enqueue(stream, std::move(op));
}

bool is_device_memory(u64 address, size_t bytes) {
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
            run_until(stream, [] { return false; });
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
    run_until(stream, [] { return false; });
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
    return CUresult(enqueue(stream, std::move(op)));
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
    if (record && !record->done) run_until(record->stream, [&] { return record->done; });
    return CUresult(fake().devices[event->device].sticky);
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
    void* reserved = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return CUresult(OUT_OF_MEMORY);
    auto* data = new unsigned char[bytes];
    memset(data, 0xCD, bytes);
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
    found->second.freed = true;
    fake().devices[found->second.device].used -= found->second.bytes;
    delete[] found->second.data;
    found->second.data = nullptr;
    return CUresult(code);
}

CUresult CUDAAPI cuMemHostAlloc(void** pointer, size_t bytes, unsigned int flags) {
    BEGIN(true);
    if (bytes == 0 || flags != 1) return CUresult(INVALID_VALUE);
    if (bytes > fake().pinned_limit - fake().pinned) return CUresult(OUT_OF_MEMORY);
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return CUresult(OUT_OF_MEMORY);
    memset(mapped, 0xCD, bytes);
    fake().pinned += bytes;
    fake().blocks[u64(mapped)] = Block{-1, bytes, static_cast<unsigned char*>(mapped)};
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
    found->second.freed = true;
    fake().pinned -= found->second.bytes;
    mprotect(pointer, found->second.bytes, PROT_NONE);
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
    for (size_t i = 0; i < KERNELS.size(); i++) {
        if (module->names.count(name) && !strcmp(KERNELS[i].name, name)) {
            module->functions.emplace_back(new Function{module, int(i)});
            *handle = reinterpret_cast<CUfunction>(module->functions.back().get());
            return CUresult(OK);
        }
    }
    return CUresult(NOT_FOUND);
}

CUresult CUDAAPI cuFuncSetAttribute(CUfunction handle, CUfunction_attribute which, int value) {
    BEGIN(true);
    if (int(which) != 8 || value < 0 || value > 227 << 10) return CUresult(INVALID_VALUE);
    reinterpret_cast<Function*>(handle)->shared_limit = value;
    return CUresult(OK);
}

CUresult CUDAAPI cuFuncGetParamInfo(CUfunction handle, size_t index, size_t* offset, size_t* size) {
    BEGIN(true);
    auto& sizes = KERNELS[reinterpret_cast<Function*>(handle)->kernel].parameters;
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
    Operation op(Operation::KERNEL);
    op.function = function;
    auto& sizes = KERNELS[function->kernel].parameters;
    for (size_t i = 0; i < sizes.size(); i++) {
        u64 value = 0;
        memcpy(&value, arguments[i], sizes[i]);
        op.arguments.push_back(value);
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
    count("entered contexts", entered);
    return f.report.c_str();
}
// Device allocations and pinned ones that were ever made.
long fake_allocations(void) {
    std::lock_guard<std::mutex> guard(fake().lock);
    return long(fake().blocks.size());
}
}
