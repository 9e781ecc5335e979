// Runs a grid: block after block, the threads of a block as fibers.
//
// A fiber runs until it ends or stands at a barrier, of its block or its warp. When all that a barrier waits for are there, they go
// on. If nobody can, the kernel's threads went different ways around a barrier: on a device that hangs or worse.
#include "host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

thread_local Dim threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned WARP = 32;
// Shared memory begins as anything: NaN, here.
constexpr char ANYTHING = '\xff';
constexpr std::size_t STACK_BYTES = 64 * 1024;

enum class State { Ready, AtBlock, AtWarp, Done };

// Where a thread runs. It begins by `setcontext`; from then on jumps go in and out, which unlike `swapcontext` ask nothing
// of the system.
struct Stack {
    ucontext_t context;
    jmp_buf inside;
    bool begun = false;
    std::unique_ptr<char[]> memory;
};

struct Fiber {
    std::unique_ptr<Stack> stack;
    State state = State::Ready;
    unsigned char given[16];
};

struct Runner {
    void (*kernel)(const void*);
    const void* params;
    std::vector<Fiber> fibers;
    std::vector<char> dynamic;
    // What a block shares, by the line that declares it.
    std::map<int, std::vector<char>> shared;
    // Stacks of threads that ended: where none meets a barrier, all run on one.
    std::vector<std::unique_ptr<Stack>> stacks;
    jmp_buf scheduler;
    unsigned current = 0;
    std::string fault;

    void yield(State state) {
        Fiber& fiber = fibers[current];
        fiber.state = state;
        if (_setjmp(fiber.stack->inside) == 0) _longjmp(scheduler, 1);
    }

    void resume(unsigned thread);
    bool run_warp(unsigned first, bool backwards);
    bool block(bool backwards);
};

thread_local Runner* runner = nullptr;
// Stacks of threads that ended, from one launch to the next.
thread_local std::vector<std::unique_ptr<Stack>> spare_stacks;

// One thread after the other.
void run_threads() {
    for (;;) {
        runner->kernel(runner->params);
        runner->yield(State::Done);
    }
}

void Runner::resume(unsigned thread) {
    current = thread;
    threadIdx.x = thread;
    Fiber& fiber = fibers[thread];
    if (!fiber.stack) {
        if (stacks.empty()) {
            fiber.stack.reset(new Stack);
            fiber.stack->memory.reset(new char[STACK_BYTES]);
        } else {
            fiber.stack = std::move(stacks.back());
            stacks.pop_back();
        }
    }
    Stack& stack = *fiber.stack;
    if (_setjmp(scheduler) == 0) {
        if (stack.begun) _longjmp(stack.inside, 1);
        stack.begun = true;
        getcontext(&stack.context);
        stack.context.uc_stack.ss_sp = stack.memory.get();
        stack.context.uc_stack.ss_size = STACK_BYTES;
        stack.context.uc_link = nullptr;
        makecontext(&stack.context, run_threads, 0);
        setcontext(&stack.context);
    }
    if (fibers[current].state == State::Done) stacks.push_back(std::move(fibers[current].stack));
}

// Runs a warp as far as it gets without the others: a warp that does not wait where it should is then far ahead. Whether it
// moved at all.
bool Runner::run_warp(unsigned first, bool backwards) {
    for (bool moved = false;; moved = true) {
        bool ready = false;
        unsigned at_warp = 0;
        for (unsigned i = 0; i < WARP; i++) {
            const unsigned thread = first + (backwards ? WARP - 1 - i : i);
            if (fibers[thread].state == State::Ready) {
                ready = true;
                resume(thread);
                if (!fault.empty()) return true;
            }
            at_warp += fibers[thread].state == State::AtWarp;
        }
        if (at_warp == WARP)
            for (unsigned thread = first; thread < first + WARP; thread++) fibers[thread].state = State::Ready;
        else if (!ready)
            return moved;
    }
}

// Whether all threads ended.
bool Runner::block(bool backwards) {
    for (Fiber& fiber : fibers) fiber.state = State::Ready;
    const unsigned count = fibers.size(), num_warps = count / WARP;
    for (;;) {
        bool moved = false;
        for (unsigned i = 0; i < num_warps; i++) {
            moved |= run_warp(WARP * (backwards ? num_warps - 1 - i : i), backwards);
            if (!fault.empty()) return false;
        }
        unsigned at_block = 0, done = 0;
        for (const Fiber& fiber : fibers) {
            at_block += fiber.state == State::AtBlock;
            done += fiber.state == State::Done;
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
    return runner->dynamic.data();
}

void* host::shared(int line, unsigned bytes) {
    std::vector<char>& memory = runner->shared[line];
    if (memory.empty()) memory.resize(bytes, ANYTHING);
    return memory.data();
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
    here.stacks.swap(spare_stacks);
    runner = &here;
    gridDim.x = grid;
    blockDim.x = block;
    // Behind dynamic shared memory stands what must stay as it is.
    constexpr char GUARD = 0x5a;
    constexpr std::size_t GUARD_BYTES = 256;
    for (unsigned i = 0; i < grid && here.fault.empty(); i++) {
        here.shared.clear();
        here.dynamic.assign(shared_bytes, ANYTHING);
        here.dynamic.resize(shared_bytes + GUARD_BYTES, GUARD);
        blockIdx.x = backwards ? grid - 1 - i : i;
        if (!here.block(backwards)) break;
        for (std::size_t at = shared_bytes; at < here.dynamic.size(); at++)
            if (here.dynamic[at] != GUARD) here.fault = "a block wrote beyond its shared memory";
    }
    runner = nullptr;
    // A thread that met a fault ended where it must not go on.
    if (here.fault.empty()) here.stacks.swap(spare_stacks);
    fault = here.fault;
    return fault.empty() ? nullptr : fault.c_str();
}
