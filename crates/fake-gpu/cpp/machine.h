// The machine behind the fake driver and the fake NCCL: devices, memory, streams and the adversary that runs their work. See
// driver.cpp.

#pragma once

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

#include <condition_variable>
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

namespace machine {

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

// One stream's part in work that several streams do together. The stream stays at it until the others have come.
struct Exchange {
    bool arrived = false;
    virtual ~Exchange() {}
    // The stream has got here: does what can be done now.
    virtual void arrive() = 0;
    virtual bool over() const = 0;
};

struct Operation {
    enum Kind { COPY, FILL, KERNEL, RECORD, WAIT, EXCHANGE } kind;
    explicit Operation(Kind kind) : kind(kind) {}
    u64 target = 0, source = 0;
    size_t bytes = 0;
    unsigned char byte = 0;
    std::shared_ptr<Record> record;
    struct Function* function = nullptr;
    std::vector<u64> arguments;  // one word each; of a compiled kernel, the words of its structure
    unsigned grid = 0, threads = 0, shared = 0;
    std::shared_ptr<Exchange> exchange;
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

// Memory that was allocated. Its address is its key among all.
struct Block {
    int device;  // -1: pinned host memory
    size_t bytes;
    unsigned char* data;  // where the bytes are: elsewhere, if the host must not reach them at their address
    bool freed = false;
};

// A kernel of ours, compiled for the host, and what runs its grid: see host.h.
using HostKernel = void (*)(const void* structure);
using FindKernel = HostKernel (*)(const char* name, size_t* structure_bytes);
using LaunchKernel = const char* (*)(HostKernel, const void*, unsigned, unsigned, unsigned, int);

struct Module;
struct Function {
    Module* module;
    std::string name;
    int own;  // which of KERNELS; -1: compiled
    HostKernel compiled;
    std::vector<size_t> parameters;
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
inline const std::vector<Kernel> KERNELS = {
    {"add", {8, 8, 8, 8}},   // a, b, sum: f32; numel: u64
    {"fill", {8, 4, 8}},     // out: f32; value: f32; numel: u64
    {"fail", {}},            // accesses an illegal address
    {"scale_small", {8, 1, 2, 4, 4}},  // out: f32; u8, u16, i32: their sum is added; numel: u32
};

struct Fake {
    std::mutex lock;
    std::condition_variable changed;  // something was queued, or need not be waited for any more
    int version = 13000;
    bool initialised = false, peers = true;
    std::vector<Device> devices = std::vector<Device>(1);
    std::map<std::thread::id, std::vector<int>> current;  // contexts: device + 1
    std::set<CUstream_fake*> streams;
    std::set<Event*> events;
    std::set<Module*> modules;
    std::map<u64, Block> blocks;  // by address, freed ones too
    std::set<std::pair<int, int>> enabled;
    bool host_access = false;  // the host reaches devices' memory
    FindKernel find_kernel = nullptr;
    LaunchKernel launch_kernel = nullptr;
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
    long communicators = 0;  // of NCCL
};

inline Fake& fake() {
    static Fake* instance = new Fake;
    return *instance;
}

inline u64 next_random() {
    u64& x = fake().random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x * 0x2545F4914F6CDD1Dull >> 16;
}

inline void violation(const std::string& what) { fake().violations.push_back(what); }

// The bytes behind an address, if `bytes` of them are in one live block; pageable host memory is as it is.
inline unsigned char* resolve(u64 address, size_t bytes, const char* what, bool no_pageable) {
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

inline void fail_device(int device, int code) { fake().devices[device].sticky = code; }

const size_t PAGE = 4096;
inline size_t whole_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

// Behind the bytes of a block, up to the end of its page, stands what must stay as it is. Then comes a page without access.
const unsigned char GUARD = 0xA5;

inline bool guard_stands(const Block& block) {
    for (size_t at = block.bytes; at < whole_pages(block.bytes); at++)
        if (block.data[at] != GUARD) return false;
    return true;
}

// Runs a compiled kernel. Which words of its structure are pointers nobody says: those that are addresses of a block. Numbers are
// far below and floats far above them.
inline void run_compiled(CUstream_fake* stream, Operation& op) {
    const std::string& name = op.function->name;
    std::vector<std::pair<const u64, Block>*> used;
    for (u64& word : op.arguments) {
        // Addresses are where the bytes are, and what lies between numbers may look like one.
        if (fake().host_access) break;
        auto next = fake().blocks.upper_bound(word);
        if (next == fake().blocks.begin()) continue;
        auto& entry = *std::prev(next);
        Block& block = entry.second;
        if (word - entry.first >= block.bytes) continue;
        if (block.freed) return violation(name + " uses freed memory");
        bool reached = block.device < 0 || block.device == stream->device ||
                       fake().enabled.count({stream->device, block.device});
        if (!reached) return violation(name + " uses memory of another GPU");
        word = u64(block.data) + (word - entry.first);
        used.push_back(&entry);
    }
    int backwards = int(next_random() % 2);
    const char* fault = fake().launch_kernel(op.function->compiled, op.arguments.data(), op.grid, op.threads, op.shared,
                                             backwards);
    if (fault) {
        violation(name + ": " + fault);
        return fail_device(stream->device, LAUNCH_FAILED);
    }
    for (auto* entry : used)
        if (!guard_stands(entry->second)) return violation(name + " wrote past the end of its memory");
}

inline void run_kernel(CUstream_fake* stream, Operation& op) {
    if (op.function->module->unloaded) {
        violation("a kernel of an unloaded module runs");
        return;
    }
    if (op.function->compiled) return run_compiled(stream, op);
    const char* name = op.function->name.c_str();
    auto& a = op.arguments;
    auto number = [&](int i) { float f; memcpy(&f, &a[i], 4); return f; };
    auto floats = [&](int i, u64 numel) {
        return reinterpret_cast<float*>(resolve(a[i], numel * 4, name, true));
    };
    switch (op.function->own) {
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
inline void run_first(CUstream_fake* stream) {
    if (stream->queue.front().kind == Operation::EXCHANGE && fake().devices[stream->device].sticky == OK) {
        std::shared_ptr<Exchange> exchange = stream->queue.front().exchange;
        if (!exchange->arrived) {
            exchange->arrived = true;
            exchange->arrive();
            fake().changed.notify_all();
            if (!exchange->over()) return;
        }
    }
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
            unsigned char* target = resolve(op.target, op.bytes, "a fill", !fake().host_access);
            if (target) memset(target, op.byte, op.bytes);
            break;
        }
        case Operation::KERNEL: if (!dead) run_kernel(stream, op); break;
        case Operation::RECORD: op.record->done = true; op.record->time = f.clock; break;
        case Operation::WAIT: break;
        case Operation::EXCHANGE: break;
    }
    if (stream->destroyed && stream->queue.empty()) f.streams.erase(stream);
}

inline bool may_run(CUstream_fake* stream) {
    if (stream->queue.empty()) return false;
    Operation& first = stream->queue.front();
    if (first.kind == Operation::EXCHANGE)
        return !first.exchange->arrived || first.exchange->over() || fake().devices[stream->device].sticky != OK;
    return first.kind != Operation::WAIT || first.record->done;
}

inline bool run_any() {
    std::vector<CUstream_fake*> ready;
    for (auto* stream : fake().streams) if (may_run(stream)) ready.push_back(stream);
    if (ready.empty()) return false;
    run_first(ready[next_random() % ready.size()]);
    return true;
}

// Runs a stream until `over`, and of the others what it has to wait for. Records come before their waits, so this ends. False: it
// stands in an exchange whose other ranks have not queued theirs.
inline bool run_until(CUstream_fake* stream, const std::function<bool()>& over) {
    while (!over() && !stream->queue.empty()) {
        if (fake().eagerness == 1 && next_random() % 2) run_any();
        if (over() || stream->queue.empty()) break;
        Operation& first = stream->queue.front();
        if (first.kind == Operation::WAIT && !first.record->done) {
            auto record = first.record;
            if (!run_until(record->stream, [&] { return record->done; })) return false;
            if (!record->done) {
                violation("a stream waits for an event that never comes");
                break;
            }
        } else if (may_run(stream)) {
            run_first(stream);
        } else if (!run_any()) {
            return false;
        }
    }
    return true;
}

// As the host that waits: meanwhile others may call.
inline void wait_until(std::unique_lock<std::mutex>& guard, CUstream_fake* stream, const std::function<bool()>& over) {
    while (!run_until(stream, over)) fake().changed.wait_for(guard, std::chrono::milliseconds(1));
}

inline void run_all() { while (run_any()) {} }

// The adversary's turn, at the beginning of every call.
inline void take_turn() {
    if (fake().eagerness == 1) for (u64 n = next_random() % 4; n > 0; n--) run_any();
    if (fake().eagerness == 2) run_all();
}

}  // namespace machine

using namespace machine;
