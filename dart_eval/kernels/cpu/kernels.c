// One token through a gated FFN, h = act(gate x) * (up x), out = down h, at the speed of memory.
//
// Two kinds of weights. Rows of bfloat16 are multiplied as the model holds them. *Coded* ones are whole numbers of 4, 5, 6
// or 8 bits with a scale (fp16) for 128 neighbours in a row, or for a row. A number lies in two places: its first 4 bits, and
// its last, 0 to 4 of them: code = 2^last_bits * first + last - zero.
//
// What decides is that bytes are read in the order in which they lie. Columns come in chunks of 128:
//   first  gate and up, [F/4][chunks][4 neurons][gate, up][64 bytes]: one stream, of which four rows are made at a time
//   last   the last bits of them, 16 last_bits bytes in the place of 64
//   dfirst, dlast   down by neuron, [F/16][chunks][16 neurons][64 or 16 last_bits bytes]
// In 64 bytes the low nibbles are places 0..63 and the high ones 64..127; of fewer bits the lowest are places 0 and on.
// Places of down are permuted (`ORDER` in packing.py) so that sums of bytes of 4 rows come out in their own order.
//
// Products are of whole numbers: x is scale * (128 high + low) in each chunk, 15 bits, and h in each block of neurons.
// The second half of the file is the kernels, in the words of vectors.h. It is read twice, for AVX2 and for AVX-512
// (VNNI), since this file includes itself.
#ifndef WIDE
#include <cpuid.h>
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#define EXPORT __attribute__((visibility("default")))
#define IN static inline __attribute__((always_inline))
enum { BLOCK = 16, COLUMNS = 128 };

typedef struct {  // rows of bfloat16 times one vector; fields as in library.Rows
    const uint16_t *weight, *bias, *x;  // [rows, width]; [rows] or NULL; [width]
    uint16_t *out;                      // [rows]
    int32_t rows, width;
} Rows;

typedef struct {  // coded weights; fields as in library.Coded
    int32_t neurons, padded, width, chunks;  // F, F to a multiple of 16, D, ceil(D / 128)
    int32_t last_bits, zero, act;            // bits after the first four; what a code is counted from; see `activate`
    int32_t step, group;  // scales of gate and up from chunk to chunk (8, or 0: one a row); neurons that share one of down
    const uint8_t *first, *last, *dfirst, *dlast;
    const uint16_t *scales, *dscales;      // fp16: [F/4][groups][4][gate, up]; [groups][chunks * 128]
    const float *x;                        // [D]
    float *out, *scratch;                  // [D]; as many as library.Coded counts
} Coded;

enum { ROOM = 160, MOST_GROUP = 128 };  // places of a group's columns: four lists, each filled up to fours
typedef struct {  // a matrix, of whose columns a token reads some planes; fields as in library.Matrix
    int32_t rows, width, group, groups, steps;  // to a multiple of 128; ...; planes that a token reads of a row
    float slope[5], start[5];  // by planes: what 1 in a byte of their bits adds, and where it begins
    float gain[4];             // what each plane of a column saves
    uint8_t table[16];         // what the bits of one plane stand for
    const uint8_t *planes;
    const uint16_t *scales;    // fp16: [blocks][groups][256]
    float *scratch, *unit, *offset;  // [4][width]; [groups]; [groups]
    int32_t *list, *ends;      // [groups][ROOM]; [groups][4]
    int8_t *high, *low;        // [groups][ROOM]
    uint8_t *level;            // [width], filled: planes that a token reads of each column
} Matrix;
typedef struct {  // an FFN of such matrices
    Matrix *matrices;          // gate, up, down
    const float *x;
    float *out, *scratch;      // [D]; as many as library.Columns counts
    int32_t act, width;
} Columns;

typedef struct { int8_t *high, *low; float *scale, *sum; int broken; } Numbers;  // x as whole numbers, by chunks

#include "threads.h"

// -- activations, plain: the compiler makes vectors of the loops around them ------------------------------------------
IN float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
IN uint32_t to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
IN uint16_t rounded(float f) {  // to bfloat16, as torch does
    return f != f ? 0x7fc0 : (uint16_t)((to_bits(f) + 0x7fff + (to_bits(f) >> 16 & 1)) >> 16);
}
#define ROUND 12582912.f  // 1.5 * 2^23: what is added to it is rounded to a whole number, in its last bits
#define NEAREST(f) ((int)to_bits((f) + ROUND) - (int)to_bits(ROUND))
IN float exp_of(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    float shifted = x * 1.44269504f + ROUND, n = shifted - ROUND, r = x - n * .693359375f + n * 2.12194440e-4f;
    float p = ((((1.f / 720 * r + 1.f / 120) * r + 1.f / 24) * r + 1.f / 6) * r + .5f) * r * r + r + 1.f;
    return p * from_bits((to_bits(shifted) + 127u) << 23);
}
IN float activate(int act, float x) {
    if (act == 0) return x / (1.f + exp_of(-x));  // SiLU
    if (act == 1) return x / (1.f + exp_of(-1.5957691216f * (x + .044715f * x * x * x)));  // GELU, by tanh
    if (act == 3) return x < 0 ? 0.f : x;  // ReLU
    // GELU, by erf (Abramowitz and Stegun 7.1.26: off by 1.5e-7 at most)
    float z = fabsf(x) * .70710678f, t = 1.f / (1.f + .3275911f * z);
    float p = (((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - .284496736f) * t + .254829592f;
    float tail = .5f * p * t * exp_of(-z * z);
    return x * (x < 0 ? tail : 1.f - tail);
}

// What a processor has: 2 AVX-512 with VNNI, 1 AVX2, 0 neither
EXPORT int cpu_level(void) {
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
#define SUPPORTS __builtin_cpu_supports
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C) || !SUPPORTS("avx2") || !SUPPORTS("fma")) return 0;
    return SUPPORTS("avx512bw") && SUPPORTS("avx512dq") && SUPPORTS("avx512vl") && SUPPORTS("avx512vnni") ? 2 : 1;
}
#define PREFETCH(p) _mm_prefetch((const char *)(p), _MM_HINT_T1)
#define PART(n, t, all) ((int)((int64_t)(n) * (t) / (all)))

#define WIDE 0
#define FN(name) name##_256
#define HAS __attribute__((target("avx2,fma,f16c")))
#include __FILE__
#undef WIDE
#undef FN
#undef HAS
#define WIDE 1
#define FN(name) name##_512
#define HAS __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#include __FILE__

// level: as of cpu_level. threads: those that share the work
EXPORT void rows_product(const Rows *job, int level, int threads) { run(level == 2 ? rows_512 : rows_256, job, threads); }
EXPORT void columns_ffn(const Columns *job, int level, int threads) { run(level == 2 ? columns_512 : columns_256, job, threads); }
EXPORT void coded_ffn(const Coded *job, int level, int threads) { run(level == 2 ? coded_512 : coded_256, job, threads); }

#else  // -- the kernels, once for each WIDE --------------------------------------------------------------------------
#include "vectors.h"

// -- rows of bfloat16: a register of these is LANES even columns, shifted up, and LANES odd ones ----------------------
DEF(Floats, even)(Ints v) { return AS_FLOATS(F(slli_epi32)(v, 16)); }
DEF(Floats, odd)(Ints v) { return AS_FLOATS(AND(v, F(set1_epi32)((int)0xffff0000))); }
DEF(float, all)(const Floats *s) { return FN(sum)(F(add_ps)(F(add_ps)(s[0], s[2]), F(add_ps)(s[1], s[3]))); }
DEF(Ints, last)(const uint16_t *w, int left) {  // the end of a row, behind which nothing is read
    uint16_t padded[2 * LANES] = {0};
    memcpy(padded, w, 2 * (size_t)(left < 2 * LANES ? left : 2 * LANES));
    return LOAD(padded);
}
DEF(void, times_h)(Ints w, Ints h, Floats *s) {
    s[0] = F(fmadd_ps)(FN(even)(w), FN(even)(h), s[0]);
    s[1] = F(fmadd_ps)(FN(odd)(w), FN(odd)(h), s[1]);
}

// w . h, both in bfloat16: of as many neurons as models have, fp32 numbers would not fit into the first cache
DEF(float, dot)(const uint16_t *w, const uint16_t *h, int n) {
    Floats s[4] = {F(setzero_ps)(), F(setzero_ps)(), F(setzero_ps)(), F(setzero_ps)()};
    int d = 0;
    for (; d + 4 * LANES <= n; d += 4 * LANES) {
        FN(times_h)(LOAD(w + d), LOAD(h + d), s);
        FN(times_h)(LOAD(w + d + 2 * LANES), LOAD(h + d + 2 * LANES), s + 2);
    }
    for (; d < n; d += 2 * LANES) FN(times_h)(FN(last)(w + d, n - d), FN(last)(h + d, n - d), s);
    return FN(all)(s);
}
HAS static void FN(rows)(const void *of, int me, int all) {
    const Rows *L = of;
    size_t width = (size_t)L->width;
    int end = PART(L->rows, me + 1, all);
    for (int r = PART(L->rows, me, all); r < end; r++) {
        float sum = FN(dot)(L->weight + (size_t)r * width, L->x, L->width);
        L->out[r] = rounded(L->bias ? sum + from_bits((uint32_t)L->bias[r] << 16) : sum);
    }
}

#include "coded.h"
#include "columns.h"
#include "vectors.h"  // which takes its names back
#endif
