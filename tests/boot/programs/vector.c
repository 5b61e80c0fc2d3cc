// Vector instructions against scalar code and published test vectors.
#include "check.h"
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>

#define N 48

static uint32_t round_constants[64], sha_start[8];

// The constants of FIPS 180-4 are the fractions of roots of the first primes.
static void sha256_constants(void) {
  int n = 0;
  for (int p = 2; n < 64; p++) {
    int prime = 1;
    for (int d = 2; d * d <= p; d++)
      prime &= p % d != 0;
    if (!prime)
      continue;
    long double cube = cbrtl(p), square = sqrtl(p);
    round_constants[n] = (uint32_t)((cube - floorl(cube)) * 4294967296.0L);
    if (n < 8)
      sha_start[n] = (uint32_t)((square - floorl(square)) * 4294967296.0L);
    n++;
  }
}

static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

static void sha256_block(uint32_t h[8], const uint8_t *block) {
  uint32_t w[64], s[8];
  for (int i = 0; i < 16; i++)
    w[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; i++)
    w[i] = w[i - 16] + w[i - 7] + (rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3) +
           (rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10);
  memcpy(s, h, 32);
  for (int i = 0; i < 64; i++) {
    uint32_t t1 = s[7] + (rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25)) +
                  ((s[4] & s[5]) ^ (~s[4] & s[6])) + round_constants[i] + w[i];
    uint32_t t2 = (rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22)) +
                  ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
    memmove(s + 1, s, 28);
    s[4] += t1;
    s[0] = t1 + t2;
  }
  for (int i = 0; i < 8; i++)
    h[i] += s[i];
}

__attribute__((target("sha,sse4.1"))) static void sha256_block_ni(uint32_t h[8], const uint8_t *block) {
  uint32_t w[64];
  for (int i = 0; i < 16; i++)
    w[i] = __builtin_bswap32(((const uint32_t *)block)[i]);
  // The message schedule by its own instructions, four words at a time.
  for (int i = 16; i < 64; i += 4) {
    __m128i a = _mm_loadu_si128((void *)(w + i - 16)), b = _mm_loadu_si128((void *)(w + i - 12));
    __m128i c = _mm_loadu_si128((void *)(w + i - 8)), d = _mm_loadu_si128((void *)(w + i - 4));
    __m128i t = _mm_add_epi32(_mm_sha256msg1_epu32(a, b), _mm_alignr_epi8(d, c, 4));
    _mm_storeu_si128((void *)(w + i), _mm_sha256msg2_epu32(t, d));
  }
  __m128i abef = _mm_set_epi32(h[0], h[1], h[4], h[5]), cdgh = _mm_set_epi32(h[2], h[3], h[6], h[7]);
  for (int i = 0; i < 64; i += 2) {
    __m128i k = _mm_set_epi32(0, 0, w[i + 1] + round_constants[i + 1], w[i] + round_constants[i]);
    __m128i next = _mm_sha256rnds2_epu32(cdgh, abef, k);
    cdgh = abef;
    abef = next;
  }
  uint32_t x[4], y[4];
  _mm_storeu_si128((void *)x, abef);
  _mm_storeu_si128((void *)y, cdgh);
  uint32_t add[8] = {x[3], x[2], y[3], y[2], x[1], x[0], y[1], y[0]};
  for (int i = 0; i < 8; i++)
    h[i] += add[i];
}

static void sha256(void) {
  static const uint32_t abc[8] = {0xba7816bf, 0x8f01cfea, 0x414140de, 0x5dae2223,
                                  0xb00361a3, 0x96177a9c, 0xb410ff61, 0xf20015ad};
  uint8_t block[64] = {'a', 'b', 'c', 0x80, [63] = 24};
  uint32_t h[8], g[8];
  sha256_constants();
  memcpy(h, sha_start, 32);
  sha256_block(h, block);
  check("sha256", memcmp(h, abc, 32) == 0, "begins with %08x", h[0]);
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_SHA))
    return;
  int same = 1;
  for (int i = 0; i < 2000; i++) {
    for (int j = 0; j < 64; j++)
      block[j] = random64();
    memcpy(g, h, 32);
    sha256_block(h, block);
    sha256_block_ni(g, block);
    same &= memcmp(h, g, 32) == 0;
  }
  check("sha256-ni", same, "differs from plain C");
}

#define EXPAND(i, r)                                                                                            \
  {                                                                                                            \
    __m128i t = _mm_shuffle_epi32(_mm_aeskeygenassist_si128(k[i - 1], r), 0xff), s = k[i - 1];                 \
    s = _mm_xor_si128(s, _mm_slli_si128(s, 4));                                                                \
    s = _mm_xor_si128(s, _mm_slli_si128(s, 8));                                                                \
    k[i] = _mm_xor_si128(s, t);                                                                                \
  }

// FIPS 197, appendix C.1, and back; then many blocks there and back.
static void aes(void) {
  static const uint8_t expected[16] = {0x69, 0xc4, 0xe0, 0xd8, 0x6a, 0x7b, 0x04, 0x30,
                                       0xd8, 0xcd, 0xb7, 0x80, 0x70, 0xb4, 0xc5, 0x5a};
  uint8_t key[16], text[16], out[16];
  for (int i = 0; i < 16; i++)
    key[i] = i, text[i] = 0x11 * i;
  __m128i k[11], back[11];
  k[0] = _mm_loadu_si128((void *)key);
  EXPAND(1, 1) EXPAND(2, 2) EXPAND(3, 4) EXPAND(4, 8) EXPAND(5, 16) EXPAND(6, 32) EXPAND(7, 64)
  EXPAND(8, 128) EXPAND(9, 27) EXPAND(10, 54)
  for (int i = 1; i < 10; i++)
    back[i] = _mm_aesimc_si128(k[i]);
  int good = 1;
  for (int n = 0; n < 3000; n++) {
    __m128i plain = n ? _mm_set_epi64x(random64(), random64()) : _mm_loadu_si128((void *)text);
    __m128i s = _mm_xor_si128(plain, k[0]);
    for (int i = 1; i < 10; i++)
      s = _mm_aesenc_si128(s, k[i]);
    s = _mm_aesenclast_si128(s, k[10]);
    _mm_storeu_si128((void *)out, s);
    if (n == 0)
      check("aes-encrypt", memcmp(out, expected, 16) == 0, "%02x %02x …", out[0], out[1]);
    s = _mm_xor_si128(s, k[10]);
    for (int i = 9; i > 0; i--)
      s = _mm_aesdec_si128(s, back[i]);
    s = _mm_aesdeclast_si128(s, k[0]);
    good &= _mm_movemask_epi8(_mm_cmpeq_epi8(s, plain)) == 0xffff;
  }
  check("aes-decrypt", good, "a block did not come back");
}

static void carryless(void) {
  int good = 1;
  for (int n = 0; n < 2000; n++) {
    uint64_t a = random64(), b = random64(), low = 0, high = 0, r[2];
    for (int i = 0; i < 64; i++)
      if (b >> i & 1) {
        low ^= a << i;
        high ^= i ? a >> (64 - i) : 0;
      }
    __m128i p = _mm_clmulepi64_si128(_mm_set_epi64x(a, 0), _mm_set_epi64x(0, b), 0x01);
    _mm_storeu_si128((void *)r, p);
    good &= r[0] == low && r[1] == high;
  }
  check("pclmul", good, "differs from shifts and xors");
}

static void crc(void) {
  uint64_t c = 0xffffffff;
  const char *digits = "123456789";
  c = _mm_crc32_u64(c, *(const uint64_t *)digits);
  c = _mm_crc32_u8(c, digits[8]);
  check("crc32c", (uint32_t)~c == 0xe3069283, "%08x", (uint32_t)~c);
}

static float fa[N][N], fb[N][N], fc[N][N], fd[N][N];
static double da[N][N], db[N][N], dc[N][N], dd[N][N];

// Small whole numbers: every order of additions gives the same exact result.
static void matrices(void) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) {
      da[i][j] = fa[i][j] = (int)(random64() % 63) - 31;
      db[i][j] = fb[i][j] = (int)(random64() % 63) - 31;
    }
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) {
      long sum = 0;
      for (int k = 0; k < N; k++)
        sum += (long)da[i][k] * (long)db[k][j];
      fc[i][j] = dc[i][j] = sum;
    }
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j += 4) {
      __m128 s = _mm_setzero_ps();
      for (int k = 0; k < N; k++)
        s = _mm_add_ps(s, _mm_mul_ps(_mm_set1_ps(fa[i][k]), _mm_loadu_ps(&fb[k][j])));
      _mm_storeu_ps(&fd[i][j], s);
    }
  check("matrix-sse-float", memcmp(fc, fd, sizeof fc) == 0, "differs");
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j += 8) {
      __m256 s = _mm256_setzero_ps();
      for (int k = 0; k < N; k++)
        s = _mm256_fmadd_ps(_mm256_broadcast_ss(&fa[i][k]), _mm256_loadu_ps(&fb[k][j]), s);
      _mm256_storeu_ps(&fd[i][j], s);
    }
  check("matrix-fma-float", memcmp(fc, fd, sizeof fc) == 0, "differs");
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j += 4) {
      __m256d s = _mm256_setzero_pd();
      for (int k = 0; k < N; k++)
        s = _mm256_add_pd(s, _mm256_mul_pd(_mm256_broadcast_sd(&da[i][k]), _mm256_loadu_pd(&db[k][j])));
      _mm256_storeu_pd(&dd[i][j], s);
    }
  check("matrix-avx-double", memcmp(dc, dd, sizeof dc) == 0, "differs");
}

// The error of a rounded product, by FMA and by Dekker's splitting.
static void fused(void) {
  int good = 1;
  for (int n = 0; n < 20000; n++) {
    double a = (double)(int64_t)random64() * 0x1p-40, b = (double)(int64_t)random64() * 0x1p-50;
    volatile double p = a * b, ca = 134217729.0 * a, cb = 134217729.0 * b;
    volatile double ah = ca - (ca - a), al = a - ah, bh = cb - (cb - b), bl = b - bh;
    volatile double hh = ah * bh, hl = ah * bl, lh = al * bh, ll = al * bl;
    volatile double e = hh - p;
    e = e + hl;
    e = e + lh;
    e = e + ll;
    __m128d f = _mm_fmsub_sd(_mm_set_sd(a), _mm_set_sd(b), _mm_set_sd(p));
    good &= _mm_cvtsd_f64(f) == e;
  }
  check("fma-is-fused", good, "the error of a product is wrong");
}

static void integers(void) {
  int gather = 1, shuffle = 1, add = 1;
  int32_t table[256];
  for (int i = 0; i < 256; i++)
    table[i] = random64();
  for (int n = 0; n < 1000; n++) {
    int32_t index[8], got[8];
    uint8_t bytes[32], by[32], out[32], sums[32];
    for (int i = 0; i < 8; i++)
      index[i] = random64() & 255;
    for (int i = 0; i < 32; i++)
      bytes[i] = random64(), by[i] = random64();
    _mm256_storeu_si256((void *)got, _mm256_i32gather_epi32(table, _mm256_loadu_si256((void *)index), 4));
    __m256i x = _mm256_loadu_si256((void *)bytes), y = _mm256_loadu_si256((void *)by);
    _mm256_storeu_si256((void *)out, _mm256_shuffle_epi8(x, y));
    _mm256_storeu_si256((void *)sums, _mm256_adds_epu8(x, y));
    for (int i = 0; i < 8; i++)
      gather &= got[i] == table[index[i]];
    for (int i = 0; i < 32; i++) {
      shuffle &= out[i] == (by[i] & 0x80 ? 0 : bytes[(i & 16) + (by[i] & 15)]);
      add &= sums[i] == (bytes[i] + by[i] > 255 ? 255 : bytes[i] + by[i]);
    }
  }
  check("avx2-gather", gather, "differs");
  check("avx2-shuffle", shuffle, "differs");
  check("avx2-saturating-add", add, "differs");
}

static void half_floats(void) {
  int good = 1;
  for (int h = 0; h < 0x7c00; h++) {
    float f = _cvtsh_ss(h);
    int e = h >> 10, m = h & 1023;
    good &= f == (e ? ldexpf(1024 + m, e - 25) : ldexpf(m, -24)) && _cvtss_sh(f, 0) == h;
  }
  check("f16c", good, "a half float is wrong");
}

static void bits(void) {
  int good = 1;
  for (int n = 0; n < 5000; n++) {
    uint64_t x = random64(), mask = random64(), extracted = 0, deposited = 0;
    for (int i = 0, k = 0; i < 64; i++)
      if (mask >> i & 1) {
        extracted |= (x >> i & 1) << k;
        deposited |= (x >> k & 1) << i;
        k++;
      }
    unsigned long long high, low = _mulx_u64(x, mask, &high);
    unsigned __int128 product = (unsigned __int128)x * mask;
    good &= _pext_u64(x, mask) == extracted && _pdep_u64(x, mask) == deposited;
    good &= low == (uint64_t)product && high == (uint64_t)(product >> 64);
    good &= _andn_u64(x, mask) == (~x & mask) && _blsr_u64(x) == (x & (x - 1));
  }
  check("bmi", good, "differs");
}

int main(void) {
  sha256();
  aes();
  carryless();
  crc();
  matrices();
  fused();
  integers();
  half_floats();
  bits();
  return failures != 0;
}
