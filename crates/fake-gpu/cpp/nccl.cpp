// NCCL without GPUs, for tests: its entry points over the fake driver's streams, for ranks that are threads of one process. It is part
// of the driver's library, so that both work on the same machine.
//
// As unhelpful as the rules of a non-blocking communicator allow:
//
// - What a group of calls asks for reaches the stream when the communicator says that it is ready, often some questions later; before
//   ranks exchange for the first time, both have to have asked.
// - A stream stays at its part until the others have come to theirs. Data moves pair by pair in any order, when both are there: so
//   a rank may be over while others are not.
// - Calls that do not fit each other hang. So does a device that a test stalls.
// - A communicator that is used before it is ready, after its end, or ended with work under way is a violation.
// - Any call of a device fails on demand, and communicators report errors from the background on demand.

#include "machine.h"

#include <algorithm>

#ifdef REAL_NCCL_H  // To hold our declarations against NVIDIA's: -DREAL_NCCL_H='<nccl.h>'.
#include REAL_NCCL_H
#else
#include <climits>
extern "C" {
typedef struct ncclComm* ncclComm_t;
typedef struct { char internal[128]; } ncclUniqueId;
typedef enum { ncclSuccess = 0, ncclNumResults = 8 } ncclResult_t;
typedef enum { ncclInt8 = 0, ncclUint8 = 1, ncclNumTypes = 12 } ncclDataType_t;
typedef struct CUstream_st* cudaStream_t;
typedef struct {
    size_t size;
    unsigned int magic, version;
    int blocking, cgaClusterSize, minCTAs, maxCTAs;
    const char* netName;
    int splitShare;
} ncclConfig_t;
}
#define NCCL_CONFIG_UNDEF_INT INT_MIN
#define NCCL_CONFIG_UNDEF_PTR nullptr
#endif

namespace {

enum : int {
    SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, SYSTEM_ERROR = 2, INTERNAL_ERROR = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5,
    REMOTE_ERROR = 6, IN_PROGRESS = 7,
};

// What 2.18 knows of a configuration: later versions only append.
const size_t CONFIG_BYTES = 44;
const int OLDEST_CONFIG = 21800;

enum Kind { MESSAGE, ALL_GATHER, BROADCAST };

struct Part;

// What one rank sends to another, or receives from it.
struct Transfer {
    Part* part;
    bool is_send;
    int peer;
    size_t index;  // among those between these two in this direction
    Kind kind;
    u64 address;
    size_t bytes;
    bool done = false;
};

// Ranks that have, or will have, a communicator with each other.
struct Clique {
    std::vector<ncclComm*> ranks;
    std::vector<bool> came;
    // By sender and receiver.
    std::map<std::pair<int, int>, std::vector<std::shared_ptr<Transfer>>> sends, receives;
    std::set<std::pair<int, int>> asked;
};

}  // namespace

struct ncclComm {
    enum State { JOINING, READY, LAUNCHING, FINALIZING, FINALIZED } state = JOINING;
    std::shared_ptr<Clique> clique;
    int rank, device;
    int patience = 0;  // questions before the next step
    std::vector<std::pair<CUstream_fake*, std::shared_ptr<Part>>> pending;
    std::vector<std::shared_ptr<Part>> parts;  // on streams, until they are over
    int error = SUCCESS;
    std::string last_error;
};

namespace {

struct Nccl {
    int version = 22809;
    u64 ids = 0;
    std::map<u64, std::weak_ptr<Clique>> cliques;
    std::set<ncclComm*> alive;
    std::set<int> stalled;
    std::map<int, long> calls;
    int fail_device = -1, fail_with = SUCCESS;
    long fail_at = -1;
    std::map<int, int> errors;  // of the background, by device
};

Nccl& nccl() {
    static Nccl* instance = new Nccl;
    return *instance;
}

// A rank's part in a group of calls, on one stream.
struct Part : Exchange {
    int device, rank;
    std::shared_ptr<Clique> clique;
    std::vector<std::shared_ptr<Transfer>> transfers;
    bool aborted = false;

    bool over() const override {
        if (aborted) return true;
        for (auto& transfer : transfers) if (!transfer->done) return false;
        return true;
    }
    void arrive() override;
};

unsigned char* bytes_of(const Transfer& transfer) {
    // The host's memory stands in for any device's.
    if (fake().host_access) return reinterpret_cast<unsigned char*>(transfer.address);
    auto next = fake().blocks.upper_bound(transfer.address);
    if (next == fake().blocks.begin() || std::prev(next)->second.device != transfer.part->device) {
        violation("NCCL is given memory that is not the communicator's GPU's");
        return nullptr;
    }
    return resolve(transfer.address, transfer.bytes, "NCCL", true);
}

void Part::arrive() {
    auto waiting = transfers;
    while (!waiting.empty()) {
        size_t which = next_random() % waiting.size();
        auto mine = waiting[which];
        waiting.erase(waiting.begin() + long(which));
        auto ends = mine->is_send ? std::make_pair(rank, mine->peer) : std::make_pair(mine->peer, rank);
        auto& others = (mine->is_send ? clique->receives : clique->sends)[ends];
        if (mine->done || mine->index >= others.size()) continue;
        auto theirs = others[mine->index];
        Part* other = theirs->part;
        if (!other || !other->arrived || other->aborted || aborted) continue;
        if (nccl().stalled.count(device) || nccl().stalled.count(other->device)) continue;
        // Else they wait for each other for good.
        if (mine->kind != theirs->kind || mine->bytes != theirs->bytes) continue;
        auto& source = mine->is_send ? *mine : *theirs;
        auto& target = mine->is_send ? *theirs : *mine;
        unsigned char *from = bytes_of(source), *to = bytes_of(target);
        if (from && to) memmove(to, from, mine->bytes);
        mine->done = theirs->done = true;
    }
}

struct Call {
    ncclComm* comm;
    Transfer transfer;
    CUstream_fake* stream;
};

thread_local int depth = 0, failed = SUCCESS;  // of the thread's group
thread_local std::vector<Call> grouped;

// Every entry point begins here.
int begin() {
    take_turn();
    auto& stack = fake().current[std::this_thread::get_id()];
    if (stack.empty()) {
        violation("NCCL is called without a current context");
        return INVALID_USAGE;
    }
    int device = stack.back() - 1;
    long call = ++nccl().calls[device];
    if (device == nccl().fail_device && call == nccl().fail_at) return nccl().fail_with;
    return SUCCESS;
}

// An error within a group is the group's too.
#define BEGIN                                        \
    std::unique_lock<std::mutex> guard(fake().lock); \
    if (int code = begin()) return failed = code, ncclResult_t(code)

int current_device() { return fake().current[std::this_thread::get_id()].back() - 1; }

bool is_alive(ncclComm* comm) {
    if (nccl().alive.count(comm)) return true;
    violation("a communicator is used that is not there");
    return false;
}

int refuse(ncclComm* comm, int code, const char* why) {
    comm->last_error = why;
    return code;
}

// Puts what is pending on the streams, if the ranks it is exchanged with have asked for theirs.
bool launch(ncclComm* comm) {
    auto& asked = comm->clique->asked;
    for (auto& [stream, part] : comm->pending)
        for (auto& transfer : part->transfers)
            if (transfer->peer != comm->rank && !asked.count({transfer->peer, comm->rank})) return false;
    for (auto& [stream, part] : comm->pending) {
        for (auto& transfer : part->transfers) {
            auto ends = std::make_pair(comm->rank, transfer->peer);
            if (!transfer->is_send) std::swap(ends.first, ends.second);
            auto& all = (transfer->is_send ? comm->clique->sends : comm->clique->receives)[ends];
            transfer->index = all.size();
            all.push_back(transfer);
        }
        Operation op(Operation::EXCHANGE);
        op.exchange = part;
        stream->queue.push_back(std::move(op));
        comm->parts.push_back(part);
    }
    comm->pending.clear();
    comm->state = ncclComm::READY;
    if (fake().eagerness == 2) run_all();
    fake().changed.notify_all();
    return true;
}

void forget_what_is_over(ncclComm* comm) {
    auto& parts = comm->parts;
    for (size_t i = parts.size(); i-- > 0;)
        if (parts[i]->arrived && parts[i]->over()) parts.erase(parts.begin() + long(i));
}

// Ends the group of the thread: one part for each communicator and stream.
int submit() {
    auto calls = std::move(grouped);
    grouped.clear();
    std::vector<ncclComm*> comms;
    for (auto& call : calls) {
        ncclComm* comm = call.comm;
        if (std::find(comms.begin(), comms.end(), comm) == comms.end()) comms.push_back(comm);
        auto& pending = comm->pending;
        auto found = std::find_if(pending.begin(), pending.end(), [&](auto& entry) { return entry.first == call.stream; });
        if (found == pending.end()) {
            auto part = std::make_shared<Part>();
            part->device = comm->device, part->rank = comm->rank, part->clique = comm->clique;
            pending.emplace_back(call.stream, part);
            found = std::prev(pending.end());
        }
        auto transfer = std::make_shared<Transfer>(call.transfer);
        transfer->part = found->second.get();
        if (transfer->bytes == 0) transfer->done = true;
        found->second->transfers.push_back(transfer);
        comm->clique->asked.insert({comm->rank, transfer->peer});
    }
    bool ready = true;
    for (auto* comm : comms) {
        comm->state = ncclComm::LAUNCHING;
        comm->patience = int(next_random() % 4);
        forget_what_is_over(comm);
        ready = (comm->patience < 2 && launch(comm)) && ready;
    }
    return ready ? SUCCESS : IN_PROGRESS;
}

// Notes what one call of a group asks for.
int add(ncclComm* comm, cudaStream_t handle, const std::vector<Transfer>& transfers) {
    if (!is_alive(comm)) return INVALID_ARGUMENT;
    if (comm->state != ncclComm::READY) {
        violation("a communicator is used that is not ready");
        return INVALID_USAGE;
    }
    auto* stream = reinterpret_cast<CUstream_fake*>(handle);
    if (!fake().streams.count(stream) || stream->destroyed || stream->device != comm->device) {
        violation("NCCL is given a stream of another GPU, or none");
        return refuse(comm, INVALID_ARGUMENT, "the stream is not the communicator's GPU's");
    }
    for (auto& transfer : transfers) {
        if (transfer.peer < 0 || size_t(transfer.peer) >= comm->clique->ranks.size())
            return refuse(comm, INVALID_ARGUMENT, "no such peer");
        grouped.push_back(Call{comm, transfer, stream});
    }
    return depth > 0 ? SUCCESS : submit();
}

bool is_bytes(ncclDataType_t type) { return int(type) == 0 || int(type) == 1; }

Transfer transfer(Kind kind, bool is_send, int peer, u64 address, size_t bytes) {
    Transfer transfer;
    transfer.kind = kind, transfer.is_send = is_send, transfer.peer = peer;
    transfer.address = address, transfer.bytes = bytes, transfer.part = nullptr, transfer.index = 0;
    return transfer;
}

// The communicator is gone, and what it has on streams is over.
void end(ncclComm* comm) {
    for (auto& part : comm->parts) {
        part->aborted = true;
        for (auto& transfer : part->transfers) transfer->part = nullptr;
    }
    comm->clique->ranks[size_t(comm->rank)] = nullptr;
    nccl().alive.erase(comm);
    fake().communicators--;
    fake().changed.notify_all();
    delete comm;
}

}  // namespace

extern "C" {

ncclResult_t ncclGetVersion(int* version) {
    *version = nccl().version;
    return ncclResult_t(SUCCESS);
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    BEGIN;
    u64 number = ++nccl().ids;
    memset(id, 0x5A, sizeof *id);
    memcpy(id->internal + 100, &number, sizeof number);
    return ncclResult_t(SUCCESS);
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* handle, int size, ncclUniqueId id, int rank, ncclConfig_t* config) {
    BEGIN;
    bool understood = config->magic == 0xcafebeef && config->size >= CONFIG_BYTES && config->version >= unsigned(OLDEST_CONFIG) &&
                      config->cgaClusterSize == NCCL_CONFIG_UNDEF_INT && config->minCTAs == NCCL_CONFIG_UNDEF_INT &&
                      config->maxCTAs == NCCL_CONFIG_UNDEF_INT && config->netName == NCCL_CONFIG_UNDEF_PTR &&
                      config->splitShare == NCCL_CONFIG_UNDEF_INT;
    // Blocking calls would need threads.
    if (!understood || config->blocking != 0 || rank < 0 || rank >= size) return ncclResult_t(INVALID_ARGUMENT);
    u64 number;
    memcpy(&number, id.internal + 100, sizeof number);
    auto clique = nccl().cliques[number].lock();
    if (!clique) {
        clique = std::make_shared<Clique>();
        clique->ranks.resize(size_t(size)), clique->came.resize(size_t(size));
        nccl().cliques[number] = clique;
    }
    if (clique->ranks.size() != size_t(size) || clique->came[size_t(rank)]) return ncclResult_t(INVALID_USAGE);
    auto* comm = new ncclComm;
    comm->clique = clique, comm->rank = rank, comm->device = current_device();
    comm->patience = int(next_random() % 4);
    for (auto* other : clique->ranks)
        if (other && other->device == comm->device)
            for (auto* both : {comm, other}) both->error = refuse(both, INVALID_USAGE, "Duplicate GPU detected");
    clique->ranks[size_t(rank)] = comm, clique->came[size_t(rank)] = true;
    nccl().alive.insert(comm);
    fake().communicators++;
    *handle = comm;
    return ncclResult_t(IN_PROGRESS);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    BEGIN;
    if (!is_alive(comm)) return ncclResult_t(INVALID_ARGUMENT);
    auto found = nccl().errors.find(comm->device);
    if (found != nccl().errors.end()) comm->error = refuse(comm, found->second, "a test asked for it");
    if (comm->error != SUCCESS) {
        *error = ncclResult_t(comm->error);
        return ncclResult_t(SUCCESS);
    }
    *error = ncclResult_t(IN_PROGRESS);
    bool asked_enough = comm->patience-- <= 0;
    switch (comm->state) {
        case ncclComm::JOINING: {
            bool all = true;
            for (bool came : comm->clique->came) all = all && came;
            if (all && asked_enough) comm->state = ncclComm::READY;
            break;
        }
        case ncclComm::LAUNCHING:
            if (asked_enough) launch(comm);
            break;
        case ncclComm::FINALIZING:
            run_any();
            forget_what_is_over(comm);
            if (comm->parts.empty() && asked_enough) comm->state = ncclComm::FINALIZED;
            break;
        default: break;
    }
    if (comm->state == ncclComm::READY || comm->state == ncclComm::FINALIZED) *error = ncclResult_t(SUCCESS);
    return ncclResult_t(SUCCESS);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    BEGIN;
    if (!is_alive(comm)) return ncclResult_t(INVALID_ARGUMENT);
    if (comm->state != ncclComm::READY) violation("a communicator is finalized that is not ready");
    comm->state = ncclComm::FINALIZING, comm->patience = int(next_random() % 4);
    return ncclResult_t(IN_PROGRESS);
}

// What they destroy is destroyed, whatever they report.

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    std::unique_lock<std::mutex> guard(fake().lock);
    int code = begin();
    if (!is_alive(comm)) return ncclResult_t(INVALID_ARGUMENT);
    if (comm->state != ncclComm::FINALIZED) violation("a communicator is destroyed that is not finalized");
    end(comm);
    return ncclResult_t(code);
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
    std::unique_lock<std::mutex> guard(fake().lock);
    int code = begin();
    if (!is_alive(comm)) return ncclResult_t(INVALID_ARGUMENT);
    end(comm);
    return ncclResult_t(code);
}

const char* ncclGetErrorString(ncclResult_t result) {
    switch (int(result)) {
        case SUCCESS: return "no error";
        case UNHANDLED_CUDA_ERROR: return "unhandled cuda error";
        case SYSTEM_ERROR: return "unhandled system error";
        case INTERNAL_ERROR: return "internal error";
        case INVALID_ARGUMENT: return "invalid argument";
        case INVALID_USAGE: return "invalid usage";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        case IN_PROGRESS: return "NCCL operation in progress";
        default: return "unknown result code";
    }
}

const char* ncclGetLastError(ncclComm_t comm) {
    std::unique_lock<std::mutex> guard(fake().lock);
    static thread_local std::string text;
    text = nccl().alive.count(comm) ? comm->last_error : "";
    return text.c_str();
}

ncclResult_t ncclGroupStart() {
    BEGIN;
    if (depth++ == 0) failed = SUCCESS;
    return ncclResult_t(SUCCESS);
}

ncclResult_t ncclGroupEnd() {
    std::unique_lock<std::mutex> guard(fake().lock);
    int code = begin();
    if (depth == 0) {
        violation("a group of NCCL's calls ends that did not begin");
        return ncclResult_t(INVALID_USAGE);
    }
    if (--depth > 0) return ncclResult_t(code);
    if (code == SUCCESS) code = failed;
    if (code != SUCCESS) {
        grouped.clear();
        return ncclResult_t(code);
    }
    return ncclResult_t(submit());
}

ncclResult_t ncclSend(const void* buffer, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    BEGIN;
    if (!is_bytes(type)) return ncclResult_t(INVALID_ARGUMENT);
    return ncclResult_t(add(comm, stream, {transfer(MESSAGE, true, peer, u64(buffer), count)}));
}

ncclResult_t ncclRecv(void* buffer, size_t count, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream) {
    BEGIN;
    if (!is_bytes(type)) return ncclResult_t(INVALID_ARGUMENT);
    return ncclResult_t(add(comm, stream, {transfer(MESSAGE, false, peer, u64(buffer), count)}));
}

ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) {
    BEGIN;
    if (!is_bytes(type) || !is_alive(comm)) return ncclResult_t(INVALID_ARGUMENT);
    std::vector<Transfer> transfers;
    for (int peer = 0; peer < int(comm->clique->ranks.size()); peer++) {
        transfers.push_back(transfer(ALL_GATHER, true, peer, u64(from), count));
        transfers.push_back(transfer(ALL_GATHER, false, peer, u64(to) + u64(peer) * count, count));
    }
    return ncclResult_t(add(comm, stream, transfers));
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
    BEGIN;
    if (!is_bytes(type) || !is_alive(comm)) return ncclResult_t(INVALID_ARGUMENT);
    std::vector<Transfer> transfers{transfer(BROADCAST, false, root, u64(to), count)};
    if (comm->rank == root)
        for (int peer = 0; peer < int(comm->clique->ranks.size()); peer++)
            transfers.push_back(transfer(BROADCAST, true, peer, u64(from), count));
    return ncclResult_t(add(comm, stream, transfers));
}

// What tests call.

void fake_nccl_version(int version) { nccl().version = version; }
// The `calls_from_now`-th call of NCCL on this device fails.
void fake_nccl_fail_at(int device, long calls_from_now, int code) {
    std::unique_lock<std::mutex> guard(fake().lock);
    nccl().fail_device = device, nccl().fail_with = code, nccl().fail_at = nccl().calls[device] + calls_from_now;
}
long fake_nccl_calls(int device) {
    std::unique_lock<std::mutex> guard(fake().lock);
    return nccl().calls[device];
}
// Communicators of this device report the error from now on.
void fake_nccl_async_error(int device, int code) {
    std::unique_lock<std::mutex> guard(fake().lock);
    nccl().errors[device] = code;
}
// What this device exchanges is never over.
void fake_nccl_stall(int device) {
    std::unique_lock<std::mutex> guard(fake().lock);
    nccl().stalled.insert(device);
}
}
