// One token through a gated FFN, h = act(gate x) * (up x), out = down h, at the speed of memory.
//
// Two kinds of weights. Rows of bfloat16 are multiplied as the model holds them. *Coded* ones are whole numbers of 4, 5, 6
// or 8 bits with a scale (fp16) for 128 neighbours in a row, or for a row. A number lies in two places: its first 4 bits, and
// the `rest`. So the first bits alone can be read, and the others add to them: code = 2^rest * first + next - half.
//
// What decides is that bytes are read in the order in which they lie. Columns come in chunks of 128:
//   first  gate and up, [F/4][chunks][4 neurons][gate, up][64 bytes]: one stream, of which four rows are made at a time
//   next   the other bits of them, 16 rest bytes in the place of 64; where neurons are chosen, one neuron after another
//   dfirst, dnext   down by neuron, [F][chunks][64 or 16 rest bytes]; where all neurons are read, 16 of them by turns
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
enum { BLOCK = 20, COLUMNS = 128 };

typedef struct {  // rows of bfloat16 times one vector; fields as in library.Rows
    const uint16_t *weight, *bias, *x;  // [F, width]; [F] or NULL; [width]
    const int64_t *index;               // [rows] of F; NULL: all
    uint16_t *out;                      // [rows]
    int32_t rows, width;
} Rows;

typedef struct {  // a sum of rows of bfloat16 times numbers; fields as in library.Sums
    const uint16_t *weight, *h;         // [F, width]; [rows]
    const int64_t *index;               // [rows]
    uint16_t *out;                      // [width]
    float *scratch;                     // [width to a multiple of 64]
    int32_t rows, width;
} Sums;

typedef struct {  // coded weights; fields as in library.Coded
    int32_t neurons, padded, width, chunks;  // F, F to a multiple of 16, D, ceil(D / 128)
    int32_t rest, half, act;                 // bits after the first four; what a code is counted from; see `activate`
    int32_t step, group;  // scales of gate and up from chunk to chunk (8, or 0: one a row); neurons that share one of down
    int32_t turns, graded, taken, coarse;  // neurons of down by turns (1, 16); are they chosen; so many exactly, as seen
    float known, line[6];  // see DartPlus; what first bits stand for: line[0] * first + line[1], of gate, up, down
    const uint8_t *first, *next, *dfirst, *dnext;
    const uint16_t *scales, *dscales;      // fp16: [F/4][groups][4][gate, up]; [groups][chunks * 128]
    const float *doubts, *columns, *x;     // [2][padded] what is left out of a row; [padded] squares of down's norms; [D]
    float *out, *scratch;                  // [D]; [7 padded + 320 chunks, and 128 chunks for each thread]
    int32_t *chosen;                       // [2][padded], filled: neurons taken exactly, and as they are seen
} Coded;

enum { ROOM = 160, MOST_GROUP = 128 };  // places of a group's columns: four lists, each filled up to fours
typedef struct {  // a matrix, of whose columns a token reads some planes; fields as in library.Matrix
    int32_t rows, width, group, groups, steps;  // to a multiple of 128; ...; planes that a token reads of a row
    float slope[5], start[5];  // by planes: what 1 in a byte of their bits adds, and where it begins
    uint8_t table[16];         // what the bits of one plane stand for
    const uint8_t *planes;
    const uint16_t *scales;    // fp16: [blocks][groups][256]
    const float *gains;        // [4][width]
    float *scratch, *unit, *offset;  // [4][width]; [groups]; [groups]
    int32_t *list, *ends;      // [groups][ROOM]; [groups][4]
    int8_t *high, *low;        // [groups][ROOM]
    uint8_t *level;            // [width], filled: planes that a token reads of each column
} Matrix;
typedef struct {  // an FFN of such matrices
    Matrix *matrices;          // gate, up, down
    const float *x;
    float *out, *scratch;      // [D]; [F]
    int32_t act, width;
} Columns;

typedef struct { int8_t *high, *low; float *scale, *sum, norm; int broken; } Numbers;  // x as whole numbers, by chunks

#include "threads.h"

// -- activations, plain: the compiler makes vectors of the loops around them ------------------------------------------
IN float from_bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
IN uint32_t to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
IN uint16_t rounded(float f) {  // to bfloat16, as torch does
    return f != f ? 0x7fc0 : (uint16_t)((to_bits(f) + 0x7fff + (to_bits(f) >> 16 & 1)) >> 16);
}
#define ROUND 12582912.f  // 1.5 * 2^23: what is added to it is rounded to a whole number, in its last bits
#define WHOLE(f) ((int)to_bits((f) + ROUND) - (int)to_bits(ROUND))
IN float exp_of(float x) {
    x = x < -87.f ? -87.f : x > 88.f ? 88.f : x;
    float whole = x * 1.44269504f + ROUND, n = whole - ROUND, r = x - n * .693359375f + n * 2.12194440e-4f;
    float p = ((((1.f / 720 * r + 1.f / 120) * r + 1.f / 24) * r + 1.f / 6) * r + .5f) * r * r + r + 1.f;
    return p * from_bits((to_bits(whole) + 127u) << 23);
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
EXPORT void rows_sum(const Sums *job, int level, int threads) { run(level == 2 ? sums_512 : sums_256, job, threads); }
EXPORT void columns_ffn(const Columns *job, int level, int threads) { run(level == 2 ? columns_512 : columns_256, job, threads); }
EXPORT void coded_ffn(const Coded *job, int level, int threads) { run(level == 2 ? coded_512 : coded_256, job, threads); }

#else  // -- the kernels, once for each WIDE --------------------------------------------------------------------------
#include "vectors.h"

// -- rows of bfloat16: a register of these is LANES even columns, shifted up, and LANES odd ones ----------------------
DEF(Floats, even)(Ints v) { return AS_FLOATS(F(slli_epi32)(v, 16)); }
DEF(Floats, odd)(Ints v) { return AS_FLOATS(AND(v, F(set1_epi32)((int)0xffff0000))); }
DEF(float, all)(const Floats *s) { return FN(sum)(F(add_ps)(F(add_ps)(s[0], s[2]), F(add_ps)(s[1], s[3]))); }
DEF(Ints, last)(const uint16_t *w, int left) {  // the end of a row, behind which nothing is read
    uint16_t whole[2 * LANES] = {0};
    memcpy(whole, w, 2 * (size_t)(left < 2 * LANES ? left : 2 * LANES));
    return LOAD(whole);
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
        size_t n = L->index ? (size_t)L->index[r] : (size_t)r;
        for (size_t d = 0; L->index && r + 1 < end && d < width; d += 32) PREFETCH(L->weight + (size_t)L->index[r + 1] * width + d);
        float sum = FN(dot)(L->weight + n * width, L->x, L->width);
        L->out[r] = rounded(L->bias ? sum + from_bits((uint32_t)L->bias[n] << 16) : sum);
    }
}
HAS static void FN(sums)(const void *of, int me, int all) {  // threads share columns, so no sum depends on their number
    const Sums *L = of;
    int both = 2 * LANES, from = PART((L->width + 63) / 64, me, all) * 64, to = PART((L->width + 63) / 64, me + 1, all) * 64;
    float *out = L->scratch;
    memset(out + from, 0, (size_t)(to - from) * 4);
    for (int j = 0; j < L->rows; j += 8) {
        const uint16_t *row[8], *next[8];
        float h[8];
        for (int i = 0; i < 8; i++) {
            int r = j + i < L->rows ? j + i : j;
            row[i] = L->weight + (size_t)L->index[r] * (size_t)L->width;
            next[i] = L->weight + (size_t)L->index[r + 8 < L->rows ? r + 8 : r] * (size_t)L->width;
            h[i] = j + i < L->rows ? from_bits((uint32_t)L->h[r] << 16) : 0.f;
        }
        for (int d = from; d < to && d < L->width; d += both) {
            Floats even = F(loadu_ps)(out + d), odd = F(loadu_ps)(out + d + LANES);
            for (int i = 0; i < 8; i++) {
                Ints w = d + both <= L->width ? LOAD(row[i] + d) : FN(last)(row[i] + d, L->width - d);
                PREFETCH(next[i] + d);
                even = F(fmadd_ps)(FN(even)(w), F(set1_ps)(h[i]), even);
                odd = F(fmadd_ps)(FN(odd)(w), F(set1_ps)(h[i]), odd);
            }
            F(storeu_ps)(out + d, even);
            F(storeu_ps)(out + d + LANES, odd);
        }
    }
    for (int d = from; d < to && d < L->width; d++) L->out[d] = rounded(out[d / both * both + d % 2 * LANES + d % both / 2]);
}

// -- coded weights ----------------------------------------------------------------------------------------------------
HAS static void FN(prepare)(const Coded *L, Numbers *q) {  // x as whole numbers
    float squares = 0;
    for (int c = 0; c < L->chunks && !q->broken; c++) {
        int from = c * COLUMNS, n = L->width - from < COLUMNS ? L->width - from : COLUMNS, sum = 0;
        float x[COLUMNS] = {0}, most = 0;
        memcpy(x, L->x + from, (size_t)n * 4);
        for (int d = 0; d < COLUMNS; d++) {
            most = fabsf(x[d]) > most ? fabsf(x[d]) : most;
            q->broken |= !(fabsf(x[d]) <= FLT_MAX);
            squares += x[d] * x[d];
        }
        float inverse = most > 1e-30f && !q->broken ? 16256.f / most : 0.f;
        for (int d = 0; d < COLUMNS; d++) {
            int v = inverse ? WHOLE(x[d] * inverse) : 0;
            q->high[from + d] = (int8_t)((v + 64) >> 7);
            q->low[from + d] = (int8_t)(v - 128 * q->high[from + d]);
            sum += v;
        }
        q->scale[c] = most / 16256.f;
        q->sum[c] = (float)sum;
    }
    q->norm = sqrtf(squares);
}

// [2][padded], of gate and up: sums of scale * x * bits, and of scale * x. planes: of `bits` bits, four neurons by turns
DEF(void, look)(const Coded *L, const Numbers *q, const uint8_t *planes, int bits, int from, int to, float *seen, float *shift) {
    const uint8_t *p = planes + (size_t)from * L->chunks * 32 * bits;
    for (int n = from; n < to; n += 4) {
        const uint16_t *scale = L->scales + (size_t)n * (L->step ? L->chunks : 1) * 2;
        float each[8];
        Floats f[8];
        __m256 o = _mm256_setzero_ps(), s;
        for (int i = 0; i < 8; i++) f[i] = F(setzero_ps)();
        for (int c = 0; c < L->chunks; c++, p += 128 * bits, scale += L->step) {
            const int8_t *x = q->high + c * COLUMNS, *y = q->low + c * COLUMNS;
            s = _mm256_mul_ps(_mm256_cvtph_ps(_mm_loadu_si128((const void *)scale)), _mm256_set1_ps(q->scale[c]));
            _mm256_storeu_ps(each, s);
            o = _mm256_fmadd_ps(s, _mm256_set1_ps(q->sum[c]), o);
            _Pragma("GCC unroll 8") for (int i = 0; i < 8; i++)
                f[i] = F(fmadd_ps)(FN(dots)(p + 16 * bits * i, bits, x, y), F(set1_ps)(each[i]), f[i]);
        }
        _mm256_storeu_ps(each, o);
        for (int i = 0; i < 8; i++) {
            seen[i % 2 * L->padded + n + i / 2] = FN(sum)(f[i]);
            if (shift) shift[i % 2 * L->padded + n + i / 2] = each[i];
        }
    }
}

// What first bits promise: scores for exact reading, scores for writing as seen, and h as seen
DEF(void, scores)(const Coded *L, int act, float norm, int from, int to, const float *restrict seen,
                  const float *restrict shift, float *restrict score, float *restrict rough, float *restrict h) {
    int P = L->padded;
    const float *line = L->line, *doubts = L->doubts;
    for (int n = from; n < to; n++) {
        float g = line[0] * seen[n] + line[1] * shift[n], u = line[2] * seen[n + P] + line[3] * shift[n + P];
        float og = norm * doubts[n], ou = norm * doubts[n + P], a = activate(act, g + og), b = activate(act, g - og);
        float expected = (a * a + b * b) / 2 * (u * u + ou * ou), left;
        h[n] = activate(act, g) * u;
        left = expected - (1 - L->known) * h[n] * h[n];
        left = (left < 0 ? 0 : left) * L->columns[n], expected *= L->columns[n];
        score[n] = left <= FLT_MAX ? left > 0 ? left : 0 : INFINITY;  // no -0; what is no number counts as the largest
        rough[n] = expected <= FLT_MAX ? expected > 0 ? expected : 0 : INFINITY;
    }
    for (int n = from > L->neurons ? from : L->neurons; n < to; n++) score[n] = rough[n] = from_bits(~0u);
}

// The k largest scores, ties to the lower index: the bits of numbers >= 0 are ordered as they are, and what may not be
// taken is negative. Those taken may not be taken of `beside`. Returns how many there are: k, where there are so many
HAS static int32_t FN(least)(const int32_t *v, int n, int k, int *ties) {
    int32_t low = 0, high = 0x7f800001;  // at least k are >= low, fewer are >= high
    int c = -1;
    while (high - low > 1 && c != k) {
        int32_t middle = low + (high - low) / 2;
        c = 0;
        for (int i = 0; i < n; i++) c += v[i] >= middle;
        if (c >= k) low = middle; else high = middle;
    }
    *ties = k;
    for (int i = 0; i < n; i++) *ties -= v[i] > low;
    return low;
}
HAS static int FN(choose)(const float *scores, int n, int k, int32_t *chosen, float *beside) {
    const int32_t *v = (const int32_t *)scores;
    int ties, count = 0;
    int32_t low = FN(least)(v, n, k, &ties);
    for (int i = 0; i < n && k > 0; i++) {
        int tie = (v[i] == low) & (ties > 0), take = (v[i] > low) | tie;
        chosen[count] = i;
        count += take;
        ties -= tie;
        if (beside) ((int32_t *)beside)[i] |= -take;
    }
    return count;
}

// out += rows of down of m neurons, at most BLOCK and of one group, times h. seen: as first bits show them. after: so many
// of the following neurons are fetched meanwhile, what is read of them first
DEF(void, down)(const Coded *L, const int32_t *index, const float *h, int m, int rest, int seen, float *out, int after) {
    size_t by = (size_t)L->turns, more = (size_t)rest * 16, chunks = (size_t)L->chunks, ahead = chunks * (seen ? 64 : 2 * more);
    const uint8_t *first[BLOCK], *next[BLOCK];
    int8_t high[BLOCK], low[BLOCK];
    float most = 0;
    int sum = 0, broken = 0, m4 = (m + 3) / 4 * 4;
    for (int i = 0; i < m; i++) {
        most = fabsf(h[i]) > most ? fabsf(h[i]) : most;
        broken |= !(fabsf(h[i]) <= FLT_MAX);
    }
    for (int i = 0; i < m4; i++) {
        size_t n = (size_t)index[i < m ? i : 0];
        first[i] = L->dfirst + n / by * by * chunks * 64 + n % by * 64;
        next[i] = L->dnext + n / by * by * chunks * more + n % by * more;
        int v = i < m && most > 1e-30f && !broken ? WHOLE(h[i] * (16256.f / most)) : 0;
        high[i] = (int8_t)((v + 64) >> 7);
        low[i] = (int8_t)(v - 128 * high[i]);
        sum += v;
    }
    float unit = broken ? NAN : most / 16256.f, offset = (seen ? L->line[5] : -(float)L->half) * unit * (float)sum;
    const uint16_t *scale = L->dscales + (L->group ? (size_t)(index[0] / L->group) * chunks * COLUMNS : 0);
    for (int c = 0; c < L->chunks; c++, out += COLUMNS, scale += COLUMNS) {
        for (int i = PART(after, c, L->chunks); i < PART(after, c + 1, L->chunks); i++)
            for (size_t d = 0; d < ahead; d += 64) PREFETCH((seen ? L->dfirst : L->next) + (size_t)index[m + i] * ahead + d);
        Bytes sums[8], lows[8], v[4], u[2][4], part[2][2];
        for (int i = 0; i < 8; i++) sums[i] = lows[i] = FN(none)();
        for (int j = 0; j < m4; j += 4) {
            int32_t hs, ls;
            memcpy(&hs, high + j, 4);
            memcpy(&ls, low + j, 4);
            for (int r = 0; r < (rest ? 2 : 1); r++) {  // bytes of 4 rows side by side
                for (int i = 0; i < 4; i++)
                    v[i] = r ? FN(load)(next[j + i] + c * by * more, rest) : FN(load)(first[j + i] + c * by * 64, 4);
                Bytes a = UNPACK(lo_epi8, v[0], v[1]), b = UNPACK(lo_epi8, v[2], v[3]);
                u[r][0] = UNPACK(lo_epi16, a, b), u[r][1] = UNPACK(hi_epi16, a, b);
                a = UNPACK(hi_epi8, v[0], v[1]), b = UNPACK(hi_epi8, v[2], v[3]);
                u[r][2] = UNPACK(lo_epi16, a, b), u[r][3] = UNPACK(hi_epi16, a, b);
            }
            _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) {
                part[1][0] = part[1][1] = FN(none)();
                FN(split)(u[0][i], 4, &part[0][0], &part[0][1]);
                if (rest) FN(split)(u[1][i], rest, &part[1][0], &part[1][1]);
                for (int s = 0; s < 2; s++) FN(add)(sums + 4 * s + i, lows + 4 * s + i, part[0][s], part[1][s], rest, hs, ls);
            }
        }
        for (int i = 0; i < 8; i++)
            FN(flush)(out + 16 * i, scale + 16 * i, sums[i], lows[i], seen ? L->line[4] * unit : unit, offset);
    }
}

DEF(int, block)(const int32_t *index, int n, int group) {  // how many of the next neurons go together
    int same = 1;
    while (same < n && (!group || index[same] / group == index[0] / group)) same++;
    int blocks = (same + BLOCK - 1) / BLOCK, m = ((same + blocks - 1) / blocks + 3) / 4 * 4;
    return m < same ? m : same;
}

// h of m neurons with all of their bits: the others add to what was seen. Their rows of down are fetched meanwhile
DEF(void, exactly)(const Coded *L, const Numbers *q, const int32_t *index, int m, int rest, const float *seen,
                   const float *shift, float *h) {
    float gate[BLOCK] = {0}, up[BLOCK] = {0}, one = (float)(1 << rest), half = (float)L->half;
    for (int i = 0; i < m; i++) {
        size_t n = (size_t)index[i], line = (size_t)L->chunks * 16;
        const uint16_t *scale = L->scales + n / 4 * 8 * (L->step ? line / 16 : 1) + n % 4 * 2;
        const uint8_t *p = L->next + n * line * 2 * rest, *first = L->dfirst + n * line * 4, *next = L->dnext + n * line * rest;
        Floats g = F(setzero_ps)(), u = g;
        for (int c = 0; c < L->chunks; c++, p += 32 * rest, scale += L->step) {
            int32_t two;
            memcpy(&two, scale, 4);
            __m128 s = _mm_mul_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(two)), _mm_set1_ps(q->scale[c]));
            const int8_t *x = q->high + c * COLUMNS, *y = q->low + c * COLUMNS;
            PREFETCH(first + c * 64);
            PREFETCH(next + c * 16 * rest);
            g = F(fmadd_ps)(FN(dots)(p, rest, x, y), F(set1_ps)(_mm_cvtss_f32(s)), g);
            u = F(fmadd_ps)(FN(dots)(p + 16 * rest, rest, x, y), F(set1_ps)(_mm_cvtss_f32(_mm_movehdup_ps(s))), u);
        }
        gate[i] = FN(sum)(g) + one * seen[n] - half * shift[n];
        up[i] = FN(sum)(u) + one * seen[n + L->padded] - half * shift[n + L->padded];
    }
    for (int i = 0; i < BLOCK; i++) h[i] = activate(L->act, gate[i]) * up[i];
}

DEF(void, job)(const Coded *L, int me, int all, int rest) {
    static Numbers q;
    static int count[2];
    int P = L->padded, wide = L->chunks * COLUMNS, from = PART(P / 16, me, all) * 16, to = PART(P / 16, me + 1, all) * 16;
    float *seen = L->scratch, *shift = seen + 2 * P, *score = shift + 2 * P, *rough = score + P, *shown = rough + P;
    float *numbers = shown + P, *parts = numbers + wide / 2 + 2 * wide, *part = parts + (size_t)me * wide, h[BLOCK];
    float one = (float)(1 << rest), half = (float)L->half, *more = score;  // [2][padded]
    if (me == 0) {
        q = (Numbers){(int8_t *)numbers, (int8_t *)(numbers + wide / 4), numbers + wide / 2, numbers + wide / 2 + wide, 0, 0};
        FN(prepare)(L, &q);
    }
    memset(part, 0, (size_t)wide * 4);
    meet(all);
    if (!q.broken) FN(look)(L, &q, L->first, 4, from, to, seen, shift);
    if (!q.broken && !L->graded) {
        if (rest) FN(look)(L, &q, L->next, rest, from, to, more, NULL);
        for (int n = from; n < to; n++) {
            float g = one * seen[n] - half * shift[n] + (rest ? more[n] : 0);
            shown[n] = activate(L->act, g) * (one * seen[n + P] - half * shift[n + P] + (rest ? more[n + P] : 0));
        }
        for (int32_t n = from, index[16]; n < to; n += 16) {
            for (int i = 0; i < 16; i++) index[i] = n + i;
            FN(down)(L, index, shown + n, 16, rest, 0, part, 0);
        }
    } else if (!q.broken) {
        if (L->act == 0) FN(scores)(L, 0, q.norm, from, to, seen, shift, score, rough, shown);
        else if (L->act == 1) FN(scores)(L, 1, q.norm, from, to, seen, shift, score, rough, shown);
        else if (L->act == 2) FN(scores)(L, 2, q.norm, from, to, seen, shift, score, rough, shown);
        else FN(scores)(L, 3, q.norm, from, to, seen, shift, score, rough, shown);
        meet(all);
        if (me == 0) {
            count[0] = FN(choose)(score, P, L->taken, L->chosen, rough);
            count[1] = FN(choose)(rough, P, L->coarse, L->chosen + P, NULL);
        }
        meet(all);
        for (int r = 0; r < 2; r++) {
            const int32_t *index = L->chosen + r * P + PART(count[r], me, all), *end = L->chosen + r * P + PART(count[r], me + 1, all);
            for (int m; index < end; index += m) {
                m = FN(block)(index, (int)(end - index), L->group);
                int after = end - index - m < BLOCK ? (int)(end - index - m) : BLOCK;
                for (int i = 0; r && i < m; i++) h[i] = shown[index[i]];
                if (!r) FN(exactly)(L, &q, index, m, rest, seen, shift, h);
                if (r) FN(down)(L, index, h, m, 0, 1, part, after);
                else FN(down)(L, index, h, m, rest, 0, part, after);
            }
        }
    }
    meet(all);
    for (int d = PART(L->width, me, all); d < PART(L->width, me + 1, all); d++) {
        float s = q.broken ? NAN : 0;
        for (int t = 0; t < all; t++) s += parts[(size_t)t * wide + d];
        L->out[d] = s;
    }
}

HAS static void FN(coded)(const void *of, int me, int all) {
    int rest = ((const Coded *)of)->rest;
    if (rest == 4) FN(job)(of, me, all, 4);
    else if (rest == 2) FN(job)(of, me, all, 2);
    else if (rest == 1) FN(job)(of, me, all, 1);
    else FN(job)(of, me, all, 0);
}
#include "columns.h"
#include "vectors.h"  // which takes its names back
#endif
