/* The loops that PyTorch's operators cannot fuse, for float32 on a CPU. `native.py` compiles, loads and documents them.

   Arrays are contiguous unless a stride is an argument; sizes and strides count floats. A vector is LANES floats, of
   GCC's and Clang's vector types, so the same text becomes AVX-512, AVX2 or NEON. Work is cut into tasks by sizes alone,
   never by the number of threads: the results are the same bits for any number of them. A function returns 0, or 1
   where memory could not be had. */

#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define CHAINS 8 /* of additions at a time, which hides their latency */

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec x) { *(vec *)to = x; }
/* Past the cache, for what is not read again soon; `to` must be aligned to a vector, and others see it after a fence. */
INLINE void stream(float *to, vec x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)x);
#elif defined(__AVX__)
    _mm256_stream_ps(to, (__m256)x);
#else
    store(to, x);
#endif
}
INLINE void fence(void) {
#if defined(__AVX__)
    _mm_sfence();
#endif
}
INLINE vec fill(float x) { return x - (vec){0}; }
INLINE vec larger(vec a, vec b) {
    ivec which = a > b;
    return (vec)(((ivec)a & which) | ((ivec)b & ~which));
}

/* The sum over the lanes, by halves. */
typedef float half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
INLINE float total(vec x) {
    half h = ((half *)&x)[0] + ((half *)&x)[1];
    four f = ((four *)&h)[0];
    if (LANES == 16) f += ((four *)&h)[1];
    return (f[0] + f[2]) + (f[1] + f[3]);
}

int native_lanes(void) { return LANES; }

/* ---- threads ------------------------------------------------------------------------------------------------------ */

/* The threads are those of the OpenMP library that PyTorch has loaded: threads of our own would have to share the
   processors with PyTorch's, which spin for a while after each of its operators. `start` is its GOMP_parallel. */
typedef void (*start_function)(void (*run)(void *), void *data, unsigned threads, unsigned flags);
static start_function start;

void native_use(start_function given) { start = given; }

typedef struct {
    int (*run)(void *work, long task);
    void *work;
    long tasks, next;
    int failed;
} tasks;

static void run_tasks(void *data) {
    tasks *t = data;
    for (long task; (task = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->tasks;)
        if (t->run(t->work, task)) __atomic_store_n(&t->failed, 1, __ATOMIC_RELAXED);
}

static int in_parallel(int (*run)(void *, long), void *work, long count, int threads) {
    tasks all = {run, work, count, 0, 0};
    if (threads > count) threads = (int)count;
    if (start && threads > 1)
        start(run_tasks, &all, (unsigned)threads, 0);
    else
        run_tasks(&all);
    return all.failed;
}

/* ---- transforms of tiles ------------------------------------------------------------------------------------------ */

#define LARGEST 16 /* rows or columns of a tile */
#define BLOCK 2    /* vectors at each place that are transformed at once: two tiles of 10 x 10 stay in L1 */
#define STRIP 256  /* floats at each place that are fetched at once, where places are FAR floats apart or more: */
#define FAR 4096   /* their addresses then share a few sets of the caches, which hold no second line of them */

/* A grid of places, each of some floats; those beyond `rows` and `columns` are zero, and are not written. */
typedef struct {
    float *at;
    long row, column;
    int rows, columns;
} grid;

/* to[y'][x'] = sum over y, x of left[y'][y] right[x'][x] from[y][x], with left [outs_y, ins_y], right [outs_x, ins_x]. */
typedef struct {
    const float *left, *right;
    int outs_y, ins_y, outs_x, ins_x;
} matrices;

/* The sums of ROWS rows of a matrix with `ins` blocks, `step` vectors apart. */
#define COMBINE(ROWS)                                                                                                  \
    INLINE void combine##ROWS(const float *rows, int ins, const vec *from, long step, vec *to, long to_step) {         \
        vec sums[ROWS][BLOCK] = {{{0}}};                                                                               \
        for (int k = 0; k < ins; k++)                                                                                  \
            for (int r = 0; r < ROWS; r++)                                                                             \
                for (int b = 0; b < BLOCK; b++) sums[r][b] += rows[r * ins + k] * from[k * step + b];                  \
        for (int r = 0; r < ROWS; r++)                                                                                 \
            for (int b = 0; b < BLOCK; b++) to[r * to_step + b] = sums[r][b];                                          \
    }
COMBINE(5)
COMBINE(3)
COMBINE(1)

INLINE void combine(const float *matrix, int outs, int ins, const vec *from, long step, vec *to, long to_step) {
    int r = 0;
    for (; r + 5 <= outs; r += 5) combine5(matrix + r * ins, ins, from, step, to + r * to_step, to_step);
    for (; r + 3 <= outs; r += 3) combine3(matrix + r * ins, ins, from, step, to + r * to_step, to_step);
    for (; r < outs; r++) combine1(matrix + r * ins, ins, from, step, to + r * to_step, to_step);
}

/* `positive`, laid out as `from`, gets 1 where a number of `from` is above zero; where `rectify`, only those are read.
   Where `kept`, laid out as `to`, is 0, zero is written. */
INLINE void transform_block(const matrices *m, grid from, grid to, int rectify, uint8_t *positive, const uint8_t *kept,
                            int lanes) {
    vec in[LARGEST * LARGEST * BLOCK], half[LARGEST * LARGEST * BLOCK], out[LARGEST * BLOCK];
    const vec zero = {0};
    const int past_cache = !kept && ((uintptr_t)to.at | (uintptr_t)(4 * (to.row | to.column))) % sizeof(vec) == 0;
    for (int y = 0; y < m->ins_y; y++)
        for (int x = 0; x < m->ins_x; x++) {
            vec *into = in + (y * m->ins_x + x) * BLOCK;
            const long place = y * from.row + x * from.column;
            if (y >= from.rows || x >= from.columns || lanes < BLOCK * LANES)
                for (int b = 0; b < BLOCK; b++) into[b] = zero;
            if (y >= from.rows || x >= from.columns) continue;
            if (lanes == BLOCK * LANES)
                for (int b = 0; b < BLOCK; b++) into[b] = load(from.at + place + b * LANES);
            else
                memcpy(into, from.at + place, 4 * (size_t)lanes);
            if (positive)
                for (int k = 0; k < lanes; k++) positive[place + k] = from.at[place + k] > 0;
            if (rectify)
                for (int b = 0; b < BLOCK; b++) into[b] = larger(into[b], zero);
        }
    for (int y = 0; y < m->ins_y; y++)
        combine(m->right, m->outs_x, m->ins_x, in + y * m->ins_x * BLOCK, BLOCK, half + y * m->outs_x * BLOCK, BLOCK);
    for (int x = 0; x < m->outs_x && x < to.columns; x++) {
        combine(m->left, m->outs_y, m->ins_y, half + x * BLOCK, (long)m->outs_x * BLOCK, out, BLOCK);
        for (int y = 0; y < m->outs_y && y < to.rows; y++) {
            const long place = y * to.row + x * to.column;
            vec *values = out + y * BLOCK;
            if (kept)
                for (int k = 0; k < lanes; k++) ((float *)values)[k] = kept[place + k] ? ((float *)values)[k] : 0;
            if (lanes == BLOCK * LANES && past_cache)
                for (int b = 0; b < BLOCK; b++) stream(to.at + place + b * LANES, values[b]);
            else if (lanes == BLOCK * LANES)
                for (int b = 0; b < BLOCK; b++) store(to.at + place + b * LANES, values[b]);
            else
                memcpy(to.at + place, values, 4 * (size_t)lanes);
        }
    }
}

/* How many of a tile's rows (or columns) exist: those y with scale * y + step * (the tile's index) < total. */
typedef struct {
    long total, step, scale;
} extent;

static int existing(extent e, long index) {
    long left = e.total - e.step * index;
    left = left > 0 ? (left + e.scale - 1) / e.scale : 0;
    return left > LARGEST ? LARGEST : (int)left;
}

/* Tiles in three nested loops; each has its steps in `from` and `to`. Of the tile (a, b, c), b says which rows exist, and
   c which columns. */
typedef struct {
    matrices m;
    const float *from;
    float *to;
    uint8_t *positive;   /* see transform_block */
    const uint8_t *kept;
    long rectify, width, counts[3];
    long from_row, from_column, from_steps[3], to_row, to_column, to_steps[3];
    extent from_rows, from_columns, to_rows, to_columns;
} tiles;

static int transform_tile(void *work, long task) {
    const tiles *t = work;
    long c = task % t->counts[2], b = task / t->counts[2] % t->counts[1], a = task / t->counts[2] / t->counts[1];
    long from_at = a * t->from_steps[0] + b * t->from_steps[1] + c * t->from_steps[2];
    long to_at = a * t->to_steps[0] + b * t->to_steps[1] + c * t->to_steps[2];
    grid from = {(float *)t->from + from_at, t->from_row, t->from_column, existing(t->from_rows, b),
                 existing(t->from_columns, c)};
    grid to = {t->to + to_at, t->to_row, t->to_column, existing(t->to_rows, b), existing(t->to_columns, c)};
    uint8_t *positive = t->positive ? t->positive + from_at : NULL;
    const uint8_t *kept = t->kept ? t->kept + to_at : NULL;
    float strip[LARGEST * LARGEST * (STRIP + LANES)];
    for (long start = 0; start < t->width; start += STRIP) {
        const int length = t->width - start < STRIP ? (int)(t->width - start) : STRIP;
        grid near = {from.at + start, from.row, from.column, from.rows, from.columns};
        if (from.column >= FAR && !positive) {
            near = (grid){strip, (long)t->m.ins_x * (STRIP + LANES), STRIP + LANES, from.rows, from.columns};
            for (int y = 0; y < t->m.ins_y && y < from.rows; y++)
                for (int x = 0; x < t->m.ins_x && x < from.columns; x++)
                    memcpy(near.at + y * near.row + x * near.column, from.at + start + y * from.row + x * from.column,
                           sizeof(float) * (size_t)length);
        }
        for (int at = 0; at < length; at += BLOCK * LANES) {
            const int lanes = length - at < BLOCK * LANES ? length - at : BLOCK * LANES;
            const grid part = {near.at + at, near.row, near.column, near.rows, near.columns};
            const grid out = {to.at + start + at, to.row, to.column, to.rows, to.columns};
            uint8_t *above = positive ? positive + start + at : NULL;
            const uint8_t *keeps = kept ? kept + start + at : NULL;
            if (lanes == BLOCK * LANES)
                transform_block(&t->m, part, out, t->rectify, above, keeps, BLOCK * LANES);
            else
                transform_block(&t->m, part, out, t->rectify, above, keeps, lanes);
        }
    }
    fence();
    return 0;
}

int native_transform(const tiles *work, int threads) {
    return in_parallel(transform_tile, (void *)work, work->counts[0] * work->counts[1] * work->counts[2], threads);
}

/* ---- patches of the first convolution ------------------------------------------------------------------------------ */

/* patches [image, tile y, tile x, point y, point x, phase y, phase x, channel * k * k + 1]: what the first convolution
   multiplies by its weight and bias, in the order in which the second one's transform reads the result. The last number
   is 1, for the bias. Patches of places that the first convolution does not have are zero, the 1 too. */
typedef struct {
    const float *images; /* [image, channel, height, width] */
    float *patches;
    long count, channels, height, width, k, stride, top, left;
    long phases, tiles_y, tiles_x, tile_y, tile_x, points_y, points_x;
    long before_y, before_x, rows, columns; /* zeros before the second convolution's input, and that input's size */
} patching;

static void one_patch(const patching *p, const float *image, long y, long x, float *to) {
    long k = p->k, taps = p->channels * k * k;
    if (y < 0 || y >= p->rows || x < 0 || x >= p->columns) {
        memset(to, 0, sizeof(float) * (size_t)(taps + 1));
        return;
    }
    long top = y * p->stride - p->top, left = x * p->stride - p->left;
    int inside = top >= 0 && left >= 0 && top + k <= p->height && left + k <= p->width;
    for (long c = 0; c < p->channels; c++)
        for (long i = 0; i < k; i++, to += k) {
            const float *row = image + (c * p->height + top + i) * p->width + left;
            if (inside)
                for (long j = 0; j < k; j++) to[j] = row[j];
            else
                for (long j = 0; j < k; j++) {
                    int there = top + i >= 0 && top + i < p->height && left + j >= 0 && left + j < p->width;
                    to[j] = there ? row[j] : 0;
                }
        }
    *to = 1;
}

static int patches_of_tile(void *work, long task) {
    const patching *p = work;
    long tx = task % p->tiles_x, ty = task / p->tiles_x % p->tiles_y, n = task / p->tiles_x / p->tiles_y;
    const float *image = p->images + n * p->channels * p->height * p->width;
    long length = p->channels * p->k * p->k + 1;
    float *to = p->patches + task * p->points_y * p->points_x * p->phases * p->phases * length;
    for (long y = 0; y < p->points_y; y++)
        for (long x = 0; x < p->points_x; x++)
            for (long i = 0; i < p->phases; i++)
                for (long j = 0; j < p->phases; j++, to += length)
                    one_patch(p, image, p->phases * (p->tile_y * ty + y) + i - p->before_y,
                              p->phases * (p->tile_x * tx + x) + j - p->before_x, to);
    return 0;
}

int native_patches(const patching *work, int threads) {
    return in_parallel(patches_of_tile, (void *)work, work->count * work->tiles_y * work->tiles_x, threads);
}

/* ---- routing -------------------------------------------------------------------------------------------------------- */

/* Letters as in fused.py. The lanes of a vector are LANES images, a block: u [block, in, in_dim], g, s and their gradients
   [block, out, dim], all of vectors. The votes of a block for one input capsule are made at a time and stay in L1:
   u_hat [out * dim]. Sums over input capsules are made by each task for its group of them, and added up in order. */
typedef struct {
    const float *u, *weight; /* weight [in, in_dim, out, dim] */
    long blocks, ins, in_dim, outs, dim, groups;
    int leaky;
    const float *gains;
    float *sums;              /* [group, block, out, dim] of c u_hat, or with d_s of d b u_hat */
    float *couplings;         /* [out, in, block], or NULL */
    const float *d_s;         /* or NULL */
    const float *d_couplings; /* [out, in, block], or NULL */
} sweeping;

/* exp(x) to 2 units in the last place, for x <= 0; below -87 it is about 1e-38. */
INLINE vec exponential(vec x) {
    const vec magic = fill(12582912.0f); /* 1.5 * 2^23: adding it rounds to whole numbers */
    x = larger(x, fill(-87.0f));
    vec shifted = x * fill(1.44269504f) + magic, n = shifted - magic;
    vec r = x - n * fill(0.693359375f) - n * fill(-2.12194440e-4f);
    vec p = fill(1.0f / 5040);
    const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int k = 0; k < 7; k++) p = p * r + fill(terms[k]);
    ivec exponent = ((ivec)shifted - (ivec)magic + 127) << 23;
    return p * (vec)exponent;
}

/* The votes of one input capsule, [out * dim]: several at once, as each is a chain of additions. */
INLINE void make_votes(const vec *u, const float *weight, long all, long in_dim, vec *u_hat) {
    long at = 0;
    for (; at + CHAINS <= all; at += CHAINS) {
        vec votes[CHAINS];
        for (int c = 0; c < CHAINS; c++) votes[c] = u[0] * weight[at + c];
        for (long k = 1; k < in_dim; k++)
            for (int c = 0; c < CHAINS; c++) votes[c] += u[k] * weight[k * all + at + c];
        for (int c = 0; c < CHAINS; c++) u_hat[at + c] = votes[c];
    }
    for (; at < all; at++) {
        u_hat[at] = u[0] * weight[at];
        for (long k = 1; k < in_dim; k++) u_hat[at] += u[k] * weight[k * all + at];
    }
}

/* Their products with a vector for each output capsule. */
INLINE void products(const vec *u_hat, const vec *g, long outs, long dim, vec *b) {
    for (long j = 0; j < outs; j++, u_hat += dim, g += dim) {
        vec even = {0}, odd = {0};
        for (long d = 0; d + 1 < dim; d += 2) even += u_hat[d] * g[d], odd += u_hat[d + 1] * g[d + 1];
        if (dim % 2) even += u_hat[dim - 1] * g[dim - 1];
        b[j] = even + odd;
    }
}

INLINE void softmax(vec *b, long outs, int leaky) {
    vec most = leaky ? (vec){0} : b[0], sum;
    for (long j = leaky ? 0 : 1; j < outs; j++) most = larger(most, b[j]);
    sum = leaky ? exponential(-most) : (vec){0};
    for (long j = 0; j < outs; j++) b[j] = exponential(b[j] - most), sum += b[j];
    sum = 1 / sum;
    for (long j = 0; j < outs; j++) b[j] *= sum;
}

/* From d c to d b, in place. */
INLINE void softmax_backward(const vec *c, vec *d_c, long outs) {
    vec mean = {0};
    for (long j = 0; j < outs; j++) mean += c[j] * d_c[j];
    for (long j = 0; j < outs; j++) d_c[j] = c[j] * (d_c[j] - mean);
}

INLINE void add_couplings(vec *d_c, const float *d_couplings, long outs, long ins, long i, long blocks, long block) {
    if (d_couplings)
        for (long j = 0; j < outs; j++) d_c[j] += load(d_couplings + ((j * ins + i) * blocks + block) * LANES);
}

static vec *vectors(long count) { return aligned_alloc(64, (sizeof(vec) * (size_t)count + 63) / 64 * 64); }

INLINE int sweep(const sweeping *s, long task, long in_dim, long dim) {
    const long outs = s->outs, all = outs * dim, block = task % s->blocks, group = task / s->blocks;
    const long first = s->ins * group / s->groups, last = s->ins * (group + 1) / s->groups;
    const vec *u = (const vec *)s->u + block * s->ins * in_dim, *g = (const vec *)s->gains + block * all;
    const vec *d_s = s->d_s ? (const vec *)s->d_s + block * all : NULL;
    vec *u_hat = vectors(2 * all + 2 * outs);
    if (!u_hat) return 1;
    vec *sum = u_hat + all, *c = sum + all, *d_c = c + outs;
    memset(sum, 0, sizeof(vec) * (size_t)all);
    for (long i = first; i < last; i++) {
        make_votes(u + i * in_dim, s->weight + i * in_dim * all, all, in_dim, u_hat);
        products(u_hat, g, outs, dim, c);
        softmax(c, outs, s->leaky);
        if (s->couplings)
            for (long j = 0; j < outs; j++) store(s->couplings + ((j * s->ins + i) * s->blocks + block) * LANES, c[j]);
        if (d_s) {
            products(u_hat, d_s, outs, dim, d_c);
            add_couplings(d_c, s->d_couplings, outs, s->ins, i, s->blocks, block);
            softmax_backward(c, d_c, outs);
        }
        const vec *factor = d_s ? d_c : c;
        for (long j = 0; j < outs; j++)
            for (long at = j * dim; at < (j + 1) * dim; at++) sum[at] += factor[j] * u_hat[at];
    }
    memcpy((vec *)s->sums + (group * s->blocks + block) * all, sum, sizeof(vec) * (size_t)all);
    free(u_hat);
    return 0;
}

static int any_sweep(void *work, long task) {
    const sweeping *s = work;
    if (s->in_dim == 8 && s->dim == 16) return sweep(s, task, 8, 16);
    if (s->in_dim == 8) return sweep(s, task, 8, s->dim);
    return sweep(s, task, s->in_dim, s->dim);
}

int native_sweep(const sweeping *work, int threads) {
    return in_parallel(any_sweep, (void *)work, work->blocks * work->groups, threads);
}

/* Gradients of u and weight, from those of the weighted sums of all iterations:
   d u_hat = d_first + sum over the later iterations of c d_s + d b g. */
typedef struct {
    const float *u, *weight;
    float *d_u, *d_weight;
    long blocks, ins, in_dim, outs, dim, iterations;
    int leaky, detached;
    const float *d_first;     /* of every vote by the first iteration, [block, out, dim], or NULL */
    const float *gains, *d_s; /* [iteration, block, out, dim] */
    const float *d_couplings; /* of the first of these, [out, in, block], or NULL */
} gradients;

/* to[k] = sum over `at` of weight[k][at] * d[at] */
INLINE void poses_gradient(const float *weight, const vec *d, long all, long in_dim, vec *to) {
    long k = 0;
    for (; k + CHAINS <= in_dim; k += CHAINS) {
        vec sums[CHAINS] = {{0}};
        for (long at = 0; at < all; at++)
            for (int c = 0; c < CHAINS; c++) sums[c] += weight[(k + c) * all + at] * d[at];
        for (int c = 0; c < CHAINS; c++) to[k + c] = sums[c];
    }
    for (; k < in_dim; k++) {
        vec sum = {0};
        for (long at = 0; at < all; at++) sum += weight[k * all + at] * d[at];
        to[k] = sum;
    }
}

/* to[k] = sum over blocks and lanes of u[block][k] * d[block] */
INLINE void weights_gradient(const vec *u, long u_step, const vec *d, long d_step, long blocks, long in_dim, float *to,
                             long to_step) {
    long k = 0;
    for (; k + CHAINS <= in_dim; k += CHAINS) {
        vec sums[CHAINS] = {{0}};
        for (long block = 0; block < blocks; block++)
            for (int c = 0; c < CHAINS; c++) sums[c] += u[block * u_step + k + c] * d[block * d_step];
        for (int c = 0; c < CHAINS; c++) to[(k + c) * to_step] = total(sums[c]);
    }
    for (; k < in_dim; k++) {
        vec sum = {0};
        for (long block = 0; block < blocks; block++) sum += u[block * u_step + k] * d[block * d_step];
        to[k * to_step] = total(sum);
    }
}

INLINE int gradients_of_input(const gradients *s, long i, long in_dim, long dim) {
    const long outs = s->outs, all = outs * dim, blocks = s->blocks, ins = s->ins;
    const float *weight = s->weight + i * in_dim * all;
    vec *u_hat = vectors(all + 2 * outs + blocks * (in_dim + all));
    if (!u_hat) return 1;
    vec *c = u_hat + all, *d_c = c + outs, *us = d_c + outs, *d_u_hat = us + blocks * in_dim;
    for (long block = 0; block < blocks; block++) {
        vec *u = us + block * in_dim, *d = d_u_hat + block * all;
        memcpy(u, (const vec *)s->u + (block * ins + i) * in_dim, sizeof(vec) * (size_t)in_dim);
        if (s->d_first)
            memcpy(d, (const vec *)s->d_first + block * all, sizeof(vec) * (size_t)all);
        else
            memset(d, 0, sizeof(vec) * (size_t)all);
        if (s->iterations) make_votes(u, weight, all, in_dim, u_hat);
        for (long t = 0; t < s->iterations; t++) {
            const vec *g = (const vec *)s->gains + (t * blocks + block) * all;
            const vec *d_s = (const vec *)s->d_s + (t * blocks + block) * all;
            products(u_hat, g, outs, dim, c);
            softmax(c, outs, s->leaky);
            if (s->detached) {
                for (long j = 0; j < outs; j++)
                    for (long at = j * dim; at < (j + 1) * dim; at++) d[at] += c[j] * d_s[at];
                continue;
            }
            products(u_hat, d_s, outs, dim, d_c);
            if (t == 0) add_couplings(d_c, s->d_couplings, outs, ins, i, blocks, block);
            softmax_backward(c, d_c, outs);
            for (long j = 0; j < outs; j++)
                for (long at = j * dim; at < (j + 1) * dim; at++) d[at] += c[j] * d_s[at] + d_c[j] * g[at];
        }
        poses_gradient(weight, d, all, in_dim, (vec *)s->d_u + (block * ins + i) * in_dim);
    }
    for (long at = 0; at < all; at++)
        weights_gradient(us, in_dim, d_u_hat + at, all, blocks, in_dim, s->d_weight + i * in_dim * all + at, all);
    free(u_hat);
    return 0;
}

static int any_gradients(void *work, long i) {
    const gradients *s = work;
    if (s->in_dim == 8 && s->dim == 16) return gradients_of_input(s, i, 8, 16);
    return gradients_of_input(s, i, s->in_dim, s->dim);
}

int native_gradients(const gradients *work, int threads) {
    return in_parallel(any_gradients, (void *)work, work->ins, threads);
}

/* ---- squash --------------------------------------------------------------------------------------------------------- */

/* capsules [count, dim] = squash(scale * given + bias), with bias [width] repeated; and the gradients of both. Squares
   are summed in double precision, which no float overflows. */
typedef struct {
    const float *given, *bias;
    float *capsules;          /* or, with d_capsules, the gradient of `given` */
    const float *d_capsules;  /* or NULL */
    float *d_bias;            /* [parts, width] */
    long rows, width, dim, parts;
    float scale;
} squashing;

INLINE void squash_rows(const squashing *s, long part, long dim) {
    float *d_bias = s->d_capsules ? s->d_bias + part * s->width : NULL;
    if (d_bias) memset(d_bias, 0, sizeof(float) * (size_t)s->width);
    for (long row = s->rows * part / s->parts; row < s->rows * (part + 1) / s->parts; row++)
        for (long at = 0; at < s->width; at += dim) {
            const float *given = s->given + row * s->width + at, *bias = s->bias + at;
            float *to = s->capsules + row * s->width + at;
            double squared = 0, along = 0;
            for (long d = 0; d < dim; d++) {
                const double x = s->scale * given[d] + bias[d];
                squared += x * x;
            }
            const double n = __builtin_sqrt(squared), factor = n / (1 + squared);
            if (!s->d_capsules) {
                for (long d = 0; d < dim; d++) to[d] = (float)(factor * (s->scale * given[d] + bias[d]));
                continue;
            }
            const float *d_v = s->d_capsules + row * s->width + at;
            for (long d = 0; d < dim; d++) along += (double)d_v[d] * (s->scale * given[d] + bias[d]);
            /* d factor / d n, divided by n: its limit at zero counts for nothing there */
            const double slope = n > 0 ? along * (1 - squared) / ((1 + squared) * (1 + squared)) / n : 0;
            for (long d = 0; d < dim; d++) {
                const float d_s = (float)(factor * d_v[d] + slope * (s->scale * given[d] + bias[d]));
                to[d] = s->scale * d_s;
                d_bias[at + d] += d_s;
            }
        }
}

static int squash_part(void *work, long part) {
    const squashing *s = work;
    if (s->dim == 8)
        squash_rows(s, part, 8);
    else
        squash_rows(s, part, s->dim);
    return 0;
}

int native_squash(const squashing *work, int threads) { return in_parallel(squash_part, (void *)work, work->parts, threads); }

/* ---- sizes, by which native.py's structs are checked ------------------------------------------------------------------ */

#define SIZE_OF(name) \
    long native_size_of_##name(void) { return (long)sizeof(name); }
SIZE_OF(tiles)
SIZE_OF(patching)
SIZE_OF(sweeping)
SIZE_OF(gradients)
SIZE_OF(squashing)
