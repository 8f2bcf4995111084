// Runs a kernel's blocks as fibers on one thread: cuda_runtime.h says what it checks.
//
// A warp runs until all its lanes wait for the block, then the next warp does, so that a missing barrier shows as a stale or
// poisoned value. Fibers are made once; switching is setjmp/longjmp, which makes no system call as swapcontext would.
#include "cuda_runtime.h"

#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <memory>
#include <numeric>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
extern "C" uint32_t cuda_on_host_seed;
uint32_t cuda_on_host_seed = 0;  // 0: everything in index order

namespace cuda_on_host {
namespace {
constexpr size_t kStack = 128 * 1024, kGuard = 4096, kRedZone = 1024;
constexpr unsigned char kPoison = 0xff;
}  // namespace
}  // namespace cuda_on_host

namespace pyfold {
namespace cuda {
extern thread_local unsigned char dynamic_bytes[];
alignas(16) thread_local unsigned char dynamic_bytes[kSharedPerBlock + cuda_on_host::kRedZone];
}  // namespace cuda
}  // namespace pyfold

namespace cuda_on_host {
namespace {

enum class State { ready, at_warp, at_block, at_grid, finished };

struct Fiber {
    jmp_buf here;
    ucontext_t start;
    bool started = false;
    State state = State::ready;
    uint3 index;
    Site site;
    unsigned mask;
    uint64_t deposit, seen[32];
};

struct Block {
    uint3 index;
    std::vector<Fiber*> fibers;
    std::vector<unsigned char> shared;  // what it holds while another block runs
    Votes votes;
};

jmp_buf scheduler;
Fiber* current;
Block* block_now;
const std::function<void()>* body_now;
std::vector<std::unique_ptr<Fiber>> pool;
uint64_t random_state;

unsigned random_below(unsigned n) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>((random_state >> 33) % n);
}

// 0 .. n - 1 from a random start with a random stride that visits all.
class Shuffled {
  public:
    explicit Shuffled(unsigned n) : n_(n) {
        if (cuda_on_host_seed == 0 || n < 2) return;
        at_ = random_below(n);
        do stride_ = 1 + random_below(n - 1);
        while (std::gcd(stride_, n) != 1);
    }
    bool next(unsigned* index) {
        if (count_++ == n_) return false;
        *index = at_;
        at_ = (at_ + stride_) % n_;
        return true;
    }

  private:
    unsigned n_, at_ = 0, stride_ = 1, count_ = 0;
};

[[noreturn]] void fail(const char* what, const Block& block) {
    fprintf(stderr, "cuda_on_host: %s in block (%u, %u, %u)\n", what, block.index.x, block.index.y, block.index.z);
    const char* names[] = {"runs", "waits for its warp", "waits for its block", "waits for the grid", "has finished"};
    const Fiber* last = nullptr;
    for (const Fiber* f : block.fibers) {
        const bool same = last && last->state == f->state && (f->state == State::finished || last->site.line == f->site.line);
        last = f;
        if (same) continue;
        fprintf(stderr, "  from thread (%u, %u, %u) on: %s", f->index.x, f->index.y, f->index.z, names[int(f->state)]);
        if (f->state == State::finished || f->state == State::ready)
            fprintf(stderr, "\n");
        else
            fprintf(stderr, " at %s:%d\n", f->site.file, f->site.line);
    }
    abort();
}

void entry() {
    for (;;) {
        (*body_now)();
        current->state = State::finished;
        if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
    }
}

std::unique_ptr<Fiber> make_fiber() {
    auto fiber = std::make_unique<Fiber>();
    char* stack = static_cast<char*>(
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack == MAP_FAILED) abort();
    mprotect(stack, kGuard, PROT_NONE);
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = stack + kGuard;
    fiber->start.uc_stack.ss_size = kStack;
    makecontext(&fiber->start, entry, 0);
    return fiber;
}

void resume(Fiber* fiber) {
    current = fiber;
    threadIdx = fiber->index;
    if (_setjmp(scheduler) != 0) return;
    if (fiber->started) _longjmp(fiber->here, 1);
    fiber->started = true;
    setcontext(&fiber->start);
}

// The library's thread-local block: every __shared__ variable of every kernel, and dynamic_bytes.
struct Range {
    unsigned char* begin;
    size_t size;
};
Range thread_local_block() {
    pyfold::cuda::dynamic_bytes[0] = 0;  // it is allocated when first touched
    Range found{};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
            const auto self = reinterpret_cast<uintptr_t>(&cuda_on_host_seed);
            bool mine = false;
            size_t size = 0;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& header = info->dlpi_phdr[i];
                if (header.p_type == PT_TLS) size = header.p_memsz;
                if (header.p_type == PT_LOAD) mine |= self - (info->dlpi_addr + header.p_vaddr) < header.p_memsz;
            }
            if (mine) *static_cast<Range*>(out) = {static_cast<unsigned char*>(info->dlpi_tls_data), size};
            return static_cast<int>(mine);
        },
        &found);
    if (!found.begin) abort();
    return found;
}

// Shared memory without the part of dynamic_bytes that no kernel may touch: what is poisoned, and kept while a block waits.
struct Shared {
    Range parts[2];

    explicit Shared(size_t dynamic) {
        const Range all = thread_local_block();
        unsigned char* end = pyfold::cuda::dynamic_bytes + dynamic + kRedZone;
        unsigned char* rest = pyfold::cuda::dynamic_bytes + kSharedPerBlock + kRedZone;
        parts[0] = {all.begin, static_cast<size_t>(end - all.begin)};
        parts[1] = {rest, static_cast<size_t>(all.begin + all.size - rest)};
    }
    void poison() const {
        for (const Range& part : parts) std::memset(part.begin, kPoison, part.size);
    }
    void save(std::vector<unsigned char>& to) const {
        to.assign(parts[0].begin, parts[0].begin + parts[0].size);
        to.insert(to.end(), parts[1].begin, parts[1].begin + parts[1].size);
    }
    void restore(const std::vector<unsigned char>& from) const {
        std::memcpy(parts[0].begin, from.data(), parts[0].size);
        std::memcpy(parts[1].begin, from.data() + parts[0].size, parts[1].size);
    }
};

// Runs one warp until each of its lanes waits for the block or the grid, or is done.
void run_warp(Block& block, unsigned first) {
    const unsigned lanes = std::min<unsigned>(32, block.fibers.size() - first);
    Fiber** warp = block.fibers.data() + first;
    for (;;) {
        Shuffled order(lanes);
        for (unsigned l; order.next(&l);)
            if (warp[l]->state == State::ready) resume(warp[l]);
        bool waiting = false, released = false;
        for (unsigned l = 0; l < lanes; l++) {
            if (warp[l]->state != State::at_warp) continue;
            waiting = true;
            const unsigned mask = warp[l]->mask;
            bool complete = true;
            for (unsigned k = 0; k < 32; k++)
                if (mask >> k & 1)
                    complete &= k < lanes && warp[k]->state == State::at_warp && warp[k]->mask == mask &&
                                warp[k]->site.line == warp[l]->site.line;
            if (!complete) continue;
            uint64_t brought[32] = {};
            for (unsigned k = 0; k < lanes; k++) brought[k] = warp[k]->deposit;
            for (unsigned k = 0; k < lanes; k++) {
                if (!(mask >> k & 1)) continue;
                std::memcpy(warp[k]->seen, brought, sizeof(brought));
                warp[k]->state = State::ready;
            }
            released = true;
        }
        if (waiting && !released) fail("a warp-wide call that not all lanes of its mask reach", block);
        if (!waiting) return;
    }
}

// Runs a block to its end or to a grid sync; true at the end.
bool run_block(Block& block, size_t shared) {
    const unsigned warps = (block.fibers.size() + 31) / 32;
    for (;;) {
        Shuffled order(warps);
        for (unsigned w; order.next(&w);) run_warp(block, w * 32);
        const State state = block.fibers[0]->state;
        block.votes = {0, static_cast<int>(block.fibers.size())};
        for (Fiber* f : block.fibers) {
            if (f->state != state || (state != State::finished && f->site.line != block.fibers[0]->site.line))
                fail("a barrier that not all threads reach", block);
            block.votes.count += f->deposit != 0;
        }
        for (size_t i = shared; i < shared + kRedZone; i++)
            if (pyfold::cuda::dynamic_bytes[i] != kPoison) fail("a write past the dynamic shared memory asked for", block);
        if (state == State::finished) return true;
        if (state == State::at_grid) return false;
        for (Fiber* f : block.fibers) f->state = State::ready;
    }
}

}  // namespace

void wait(Scope scope, Site site, unsigned mask, uint64_t deposit) {
    current->site = site;
    current->mask = mask;
    current->deposit = deposit;
    current->state = scope == Scope::warp ? State::at_warp : scope == Scope::block ? State::at_block : State::at_grid;
    if (scope == Scope::warp && !(mask >> lane() & 1)) fail("a warp-wide call by a lane outside its mask", *block_now);
    if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

const uint64_t* deposits() { return current->seen; }
Votes votes() { return block_now->votes; }
int lane() {
    return static_cast<int>((current->index.x + blockDim.x * (current->index.y + blockDim.y * current->index.z)) % 32);
}

void run(dim3 grid, dim3 shape, size_t shared, bool cooperative, const std::function<void()>& body) {
    const Shared memory(shared);
    const unsigned threads = shape.x * shape.y * shape.z, n_blocks = grid.x * grid.y * grid.z;
    const unsigned resident = cooperative ? n_blocks : 1;
    if (cooperative && n_blocks > 3) {
        fprintf(stderr, "cuda_on_host: a cooperative launch of %u blocks, where 3 are resident\n", n_blocks);
        abort();
    }
    random_state = cuda_on_host_seed;
    gridDim = grid;
    blockDim = shape;
    body_now = &body;
    while (pool.size() < static_cast<size_t>(resident) * threads) pool.push_back(make_fiber());

    auto begin = [&](Block& block, unsigned index, unsigned slot) {
        block.index = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
        block.fibers.resize(threads);
        for (unsigned t = 0; t < threads; t++) {
            Fiber* f = block.fibers[t] = pool[static_cast<size_t>(slot) * threads + t].get();
            f->state = State::ready;
            f->index = {t % shape.x, t / shape.x % shape.y, t / shape.x / shape.y};
        }
    };
    auto step = [&](Block& block) {
        block_now = &block;
        blockIdx = block.index;
        return run_block(block, shared);
    };
    if (!cooperative) {
        Block block;
        Shuffled order(n_blocks);
        for (unsigned b; order.next(&b);) {
            begin(block, b, 0);
            memory.poison();
            if (!step(block)) fail("a grid sync in a launch that is not cooperative", block);
        }
        return;
    }
    std::vector<Block> blocks(n_blocks);
    for (unsigned b = 0; b < n_blocks; b++) {
        begin(blocks[b], b, b);
        memory.poison();
        memory.save(blocks[b].shared);
    }
    for (unsigned finished = 0; finished == 0;) {
        Shuffled order(n_blocks);
        for (unsigned b; order.next(&b);) {
            memory.restore(blocks[b].shared);
            finished += step(blocks[b]);
            memory.save(blocks[b].shared);
        }
        if (finished != 0 && finished != n_blocks) fail("a grid sync that not all blocks reach", blocks[0]);
        if (finished == 0)
            for (Block& block : blocks)
                for (Fiber* f : block.fibers) f->state = State::ready;
    }
}

}  // namespace cuda_on_host
