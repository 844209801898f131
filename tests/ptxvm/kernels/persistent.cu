// Layers of y = W x by blocks that stay: a loader warp streams tiles of W through a ring with
// cp.async.bulk, eight computing warps wait for the tile and for the event of the layer below,
// and signal their own. Each PLANT leaves out one of the edges that this needs.
constexpr int DIM = 64;
constexpr int ROWS = 16;
constexpr int TILES = DIM / ROWS;
constexpr int PAGES = 2;
constexpr int COMPUTE = 256;
constexpr int PAGE_BYTES = ROWS * DIM * 4;

enum Plant {
    NONE,
    NO_ACQUIRE,
    RELAXED_SIGNAL,
    NO_BARRIER,
    WRONG_BYTES,
    EARLY_RELEASE,
    EARLY_SIGNAL,
    LOW_TARGET,
    WRONG_PARITY
};

__device__ void wait_phase(unsigned bar, unsigned parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again; }" ::"r"(bar), "r"(parity) : "memory");
}

__device__ void wait_event(const unsigned* event, unsigned target, bool acquire) {
    unsigned seen;
    do {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                     : "=r"(seen) : "l"(__cvta_generic_to_global(event)) : "memory");
        if (seen < target) asm volatile("nanosleep.u32 20;" ::: "memory");
    } while (seen < target);
    if (acquire) asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

__device__ void signal_event(unsigned* event, bool release) {
    auto at = __cvta_generic_to_global(event);
    if (release)
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
    else
        asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(at) : "memory");
}

template <Plant plant>
__device__ void work(const float* weights, float* x, unsigned* events, int layers) {
    extern __shared__ __attribute__((aligned(128))) float ring[];
    __shared__ alignas(8) unsigned long long full[PAGES], empty[PAGES];
    unsigned full_at = __cvta_generic_to_shared(full);
    unsigned empty_at = __cvta_generic_to_shared(empty);
    unsigned ring_at = __cvta_generic_to_shared(ring);
    int thread = threadIdx.x;
    if (thread == 0) {
        for (int p = 0; p < PAGES; p++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full_at + 8 * p));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 8;" ::"r"(empty_at + 8 * p));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (thread >= COMPUTE) {
        int count = 0;
        for (int task = blockIdx.x; task < layers * TILES; task += gridDim.x, count++) {
            if (thread != COMPUTE) continue;
            int page = count % PAGES;
            if (count >= PAGES) wait_phase(empty_at + 8 * page, (count / PAGES - 1) & 1);
            unsigned bytes = plant == WRONG_BYTES ? PAGE_BYTES + 16 : PAGE_BYTES;
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                             full_at + 8 * page), "r"(bytes) : "memory");
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                "[%0], [%1], %2, [%3];" ::"r"(ring_at + page * PAGE_BYTES),
                "l"(__cvta_generic_to_global(weights + task * ROWS * DIM)), "r"(PAGE_BYTES),
                "r"(full_at + 8 * page) : "memory");
        }
        return;
    }
    int count = 0;
    for (int task = blockIdx.x; task < layers * TILES; task += gridDim.x, count++) {
        int page = count % PAGES, layer = task / TILES, tile = task % TILES;
        unsigned parity = count / PAGES & 1;
        wait_phase(full_at + 8 * page, plant == WRONG_PARITY ? parity ^ 1 : parity);
        if (thread == 0 && layer > 0)
            wait_event(events + layer - 1, plant == LOW_TARGET ? TILES - 1 : TILES,
                       plant != NO_ACQUIRE);
        asm volatile("bar.sync 1, 256;" ::: "memory");
        int row = thread / 16, part = thread % 16;
        float sum = 0.0f;
        if (plant == EARLY_RELEASE && thread % 32 == 0)
            asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(
                empty_at + 8 * page) : "memory");
        for (int i = part; i < DIM; i += 16)
            sum += ring[page * ROWS * DIM + row * DIM + i] * x[layer * DIM + i];
        for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffff, sum, d);
        if (plant == EARLY_SIGNAL && thread == 0) signal_event(events + layer, true);
        if (part == 0) x[(layer + 1) * DIM + tile * ROWS + row] = sum;
        __syncwarp();
        if (plant != EARLY_RELEASE && thread % 32 == 0)
            asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(
                empty_at + 8 * page) : "memory");
        if (plant != NO_BARRIER) asm volatile("bar.sync 1, 256;" ::: "memory");
        if (plant != EARLY_SIGNAL && thread == 0)
            signal_event(events + layer, plant != RELAXED_SIGNAL);
    }
}

#define KERNEL(name, plant)                                                                  \
    extern "C" __global__ void name(const float* w, float* x, unsigned* events, int layers) { \
        work<plant>(w, x, events, layers);                                                   \
    }

KERNEL(persistent, NONE)
KERNEL(no_acquire, NO_ACQUIRE)
KERNEL(relaxed_signal, RELAXED_SIGNAL)
KERNEL(no_barrier, NO_BARRIER)
KERNEL(wrong_bytes, WRONG_BYTES)
KERNEL(early_release, EARLY_RELEASE)
KERNEL(early_signal, EARLY_SIGNAL)
KERNEL(low_target, LOW_TARGET)
KERNEL(wrong_parity, WRONG_PARITY)
