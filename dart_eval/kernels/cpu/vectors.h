// What kernels.c is written in, for AVX2 and for AVX-512 (WIDE): a vector of 64 bytes is two registers there and one here.
// Read once before the kernels of a WIDE, and once behind them.
#ifndef DEF
#define DEF(type, name) HAS IN type FN(name)
#if WIDE
#define LANES 16
#define Ints __m512i
#define Floats __m512
#define Bytes __m512i  // 64
#define F(op) _mm512_##op
#define AS_FLOATS _mm512_castsi512_ps
#define AND _mm512_and_si512
#define LOAD(p) _mm512_loadu_si512((const void *)(p))
#define UNPACK(op, u, v) _mm512_unpack##op(u, v)
DEF(float, sum)(Floats v) { return _mm512_reduce_add_ps(v); }
DEF(Bytes, none)(void) { return _mm512_setzero_si512(); }
DEF(Bytes, load)(const uint8_t *p, int bits) {  // 16 bits bytes, as often as they fit
    return bits == 4 ? LOAD(p) : bits == 2 ? _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)p))
                                           : _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)p));
}
DEF(void, split)(Bytes v, int bits, Bytes *low, Bytes *high) {  // places 0..63 and 64..127, a byte each
    Ints mask = F(set1_epi8)((char)((1 << bits) - 1)), at = F(set_epi32)(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    if (bits == 2) at = AND(at, F(set1_epi32)(2));
    *low = AND(bits == 4 ? v : F(srlv_epi32)(v, at), mask);
    *high = AND(bits == 4 ? F(srli_epi32)(v, 4) : F(srlv_epi32)(v, F(add_epi32)(at, F(set1_epi32)(4))), mask);
}
DEF(Floats, dots)(const uint8_t *p, int bits, const int8_t *x, const int8_t *y) {  // LANES sums of a chunk
    Bytes low, high;
    FN(split)(FN(load)(p, bits), bits, &low, &high);
    Ints s = F(dpbusd_epi32)(F(dpbusd_epi32)(F(setzero_si512)(), low, LOAD(x)), high, LOAD(x + 64));
    s = F(slli_epi32)(s, 7);
    return F(cvtepi32_ps)(F(dpbusd_epi32)(F(dpbusd_epi32)(s, low, LOAD(y)), high, LOAD(y + 64)));
}
// sums += (2^last_bits first + last) * h, h = 128 high + low: of 4 neurons each
DEF(void, add)(Bytes *sums, Bytes *lows, Bytes first, Bytes last, int last_bits, int high, int low) {
    if (last_bits) first = _mm512_or_si512(F(slli_epi16)(first, (unsigned)last_bits), last);
    *sums = F(dpbusd_epi32)(*sums, first, F(set1_epi32)(high));
    *lows = F(dpbusd_epi32)(*lows, first, F(set1_epi32)(low));
}
DEF(void, flush)(float *out, const uint16_t *scale, Bytes sums, Bytes lows, float k, float o) {
    Floats v = F(cvtepi32_ps)(F(add_epi32)(F(slli_epi32)(sums, 7), lows)), s = F(cvtph_ps)(_mm256_loadu_si256((const void *)scale));
    F(storeu_ps)(out, F(fmadd_ps)(F(fmadd_ps)(v, F(set1_ps)(k), F(set1_ps)(o)), s, F(loadu_ps)(out)));
}
#else
#define LANES 8
#define Ints __m256i
#define Floats __m256
#define Bytes Pair
#define F(op) _mm256_##op
#define AS_FLOATS _mm256_castsi256_ps
#define AND _mm256_and_si256
#define LOAD(p) _mm256_loadu_si256((const void *)(p))
#define UNPACK(op, u, v) (Pair){_mm256_unpack##op((u).a, (v).a), _mm256_unpack##op((u).b, (v).b)}
typedef struct { __m256i a, b; } Pair;
DEF(float, sum)(Floats v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
DEF(Bytes, none)(void) { return (Pair){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
DEF(Bytes, load)(const uint8_t *p, int bits) {
    Ints v = bits == 1 ? _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)p)) : LOAD(p);
    return (Pair){v, bits == 4 ? LOAD(p + 32) : v};
}
DEF(void, split)(Bytes v, int bits, Bytes *low, Bytes *high) {
    Ints mask = F(set1_epi8)((char)((1 << bits) - 1)), at[4], step = F(set1_epi32)(2);  // by how much each half is shifted
    at[0] = bits == 1 ? F(set_epi32)(1, 1, 1, 1, 0, 0, 0, 0) : F(set1_epi32)(0);
    for (int i = 1; i < 4; i++) at[i] = bits == 4 ? F(set1_epi32)(i / 2 * 4) : F(add_epi32)(at[i - 1], step);
    *low = (Pair){AND(F(srlv_epi32)(v.a, at[0]), mask), AND(F(srlv_epi32)(v.b, at[1]), mask)};
    *high = (Pair){AND(F(srlv_epi32)(v.a, at[2]), mask), AND(F(srlv_epi32)(v.b, at[3]), mask)};
}
DEF(Ints, pairs)(Bytes low, Bytes high, const int8_t *x) {  // 16 sums of 16 bits: at most 8 * 15 * 127 each
    Ints a = F(add_epi16)(F(maddubs_epi16)(low.a, LOAD(x)), F(maddubs_epi16)(low.b, LOAD(x + 32)));
    return F(add_epi16)(a, F(add_epi16)(F(maddubs_epi16)(high.a, LOAD(x + 64)), F(maddubs_epi16)(high.b, LOAD(x + 96))));
}
DEF(Floats, dots)(const uint8_t *p, int bits, const int8_t *x, const int8_t *y) {
    Bytes low, high;
    FN(split)(FN(load)(p, bits), bits, &low, &high);
    Ints h = F(madd_epi16)(FN(pairs)(low, high, x), F(set1_epi16)(128));
    return F(cvtepi32_ps)(F(add_epi32)(h, F(madd_epi16)(FN(pairs)(low, high, y), F(set1_epi16)(1))));
}
DEF(Ints, times)(Ints v, int high, int low, int shift) {
    Ints h = F(madd_epi16)(F(maddubs_epi16)(v, F(set1_epi32)(high)), F(set1_epi16)((short)(128 << shift)));
    return F(add_epi32)(h, F(madd_epi16)(F(maddubs_epi16)(v, F(set1_epi32)(low)), F(set1_epi16)((short)(1 << shift))));
}
// One part after the other: bytes of more than 7 bits would not fit into sums of 16
DEF(void, add)(Bytes *sums, Bytes *lows, Bytes first, Bytes last, int last_bits, int high, int low) {
    (void)lows;
    for (int i = 0; i < (last_bits ? 2 : 1); i++) {
        sums->a = F(add_epi32)(sums->a, FN(times)(i ? last.a : first.a, high, low, i ? 0 : last_bits));
        sums->b = F(add_epi32)(sums->b, FN(times)(i ? last.b : first.b, high, low, i ? 0 : last_bits));
    }
}
DEF(void, flush)(float *out, const uint16_t *scale, Bytes sums, Bytes lows, float k, float o) {
    (void)lows;
    for (int i = 0; i < 2; i++, out += 8, scale += 8) {
        Floats v = F(cvtepi32_ps)(i ? sums.b : sums.a), s = F(cvtph_ps)(_mm_loadu_si128((const void *)scale));
        F(storeu_ps)(out, F(fmadd_ps)(F(fmadd_ps)(v, F(set1_ps)(k), F(set1_ps)(o)), s, F(loadu_ps)(out)));
    }
}
#endif
#else
#undef DEF
#undef LANES
#undef Ints
#undef Floats
#undef Bytes
#undef F
#undef AS_FLOATS
#undef AND
#undef LOAD
#undef UNPACK
#endif
