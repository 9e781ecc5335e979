// Runs a grid: block after block, the threads of a block as fibers.
//
// A fiber runs until it ends or stands at a barrier, of its block or its warp. When all that a barrier waits for are there, they go
// on. If nobody can, the kernel's threads went different ways around a barrier: on a device that hangs or worse.
#include "host.h"

#include <ucontext.h>

#include <string>
#include <vector>

thread_local Dim threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned WARP = 32;
constexpr std::size_t STACK_BYTES = 64 * 1024;

enum class State { Ready, AtBlock, AtWarp, Done };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    State state = State::Ready;
    bool begun = false;
    unsigned char given[16];
};

struct Runner {
    void (*kernel)(const void*);
    const void* params;
    std::vector<Fiber> fibers;
    std::vector<char> shared;
    ucontext_t scheduler;
    unsigned current = 0;
    std::string fault;

    void yield(State state) {
        Fiber& fiber = fibers[current];
        fiber.state = state;
        swapcontext(&fiber.context, &scheduler);
    }

    void resume(unsigned thread);
    bool block(bool backwards);
};

thread_local Runner* runner = nullptr;

void run_fiber() {
    runner->kernel(runner->params);
    runner->yield(State::Done);
}

void Runner::resume(unsigned thread) {
    current = thread;
    threadIdx.x = thread;
    Fiber& fiber = fibers[thread];
    if (!fiber.begun) {
        fiber.begun = true;
        getcontext(&fiber.context);
        if (fiber.stack.empty()) fiber.stack.resize(STACK_BYTES);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    swapcontext(&scheduler, &fiber.context);
}

// Whether all threads ended.
bool Runner::block(bool backwards) {
    for (Fiber& fiber : fibers) {
        fiber.state = State::Ready;
        fiber.begun = false;
    }
    const unsigned count = fibers.size();
    for (;;) {
        bool moved = false;
        for (unsigned i = 0; i < count; i++) {
            const unsigned thread = backwards ? count - 1 - i : i;
            if (fibers[thread].state != State::Ready) continue;
            resume(thread);
            if (!fault.empty()) return false;
            moved = true;
        }
        unsigned at_block = 0, done = 0;
        for (unsigned warp = 0; warp < count; warp += WARP) {
            unsigned at_warp = 0;
            for (unsigned thread = warp; thread < warp + WARP; thread++) {
                at_warp += fibers[thread].state == State::AtWarp;
                at_block += fibers[thread].state == State::AtBlock;
                done += fibers[thread].state == State::Done;
            }
            if (at_warp == WARP)
                for (unsigned thread = warp; thread < warp + WARP; thread++) fibers[thread].state = State::Ready, moved = true;
        }
        if (done == count) return true;
        if (at_block == count)
            for (Fiber& fiber : fibers) fiber.state = State::Ready, moved = true;
        if (!moved) {
            fault = "threads of a block went different ways around a barrier";
            return false;
        }
    }
}

}  // namespace

void* host::dynamic_shared() {
    return runner->shared.data();
}

void host::block_barrier() {
    runner->yield(State::AtBlock);
}

void host::exchange(const void* give, void* take, int bytes, int lane) {
    Fiber& fiber = runner->fibers[runner->current];
    const unsigned thread = runner->current;
    std::memcpy(fiber.given, give, bytes);
    runner->yield(State::AtWarp);
    std::memcpy(take, runner->fibers[thread / WARP * WARP + lane].given, bytes);
    // Nobody gives anew before all have taken.
    runner->yield(State::AtWarp);
}

void host::fault(const char* what) {
    runner->fault = what;
    runner->yield(State::Done);
    __builtin_unreachable();
}

// Runs the grid; `backwards`, with the last thread of each block first. Null, or what went wrong.
extern "C" const char* host_launch(void (*kernel)(const void*), const void* params, unsigned grid, unsigned block,
                                   unsigned shared_bytes, int backwards) {
    static thread_local std::string fault;
    if (grid == 0 || block == 0 || block > 1024 || block % WARP != 0 || shared_bytes > 48 * 1024)
        return "a launch that a device refuses";
    Runner here;
    here.kernel = kernel;
    here.params = params;
    here.fibers.resize(block);
    runner = &here;
    gridDim.x = grid;
    blockDim.x = block;
    // What is shared begins as anything: NaN, here. Behind it stands what must stay as it is.
    constexpr char ANYTHING = '\xff', GUARD = 0x5a;
    constexpr std::size_t GUARD_BYTES = 256;
    for (unsigned i = 0; i < grid && here.fault.empty(); i++) {
        here.shared.assign(shared_bytes, ANYTHING);
        here.shared.resize(shared_bytes + GUARD_BYTES, GUARD);
        blockIdx.x = backwards ? grid - 1 - i : i;
        if (!here.block(backwards)) break;
        for (std::size_t at = shared_bytes; at < here.shared.size(); at++)
            if (here.shared[at] != GUARD) here.fault = "a block wrote beyond its shared memory";
    }
    runner = nullptr;
    fault = here.fault;
    return fault.empty() ? nullptr : fault.c_str();
}
