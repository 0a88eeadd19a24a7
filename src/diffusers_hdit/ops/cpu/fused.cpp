// RMSNorm, GEGLU, and the normalizing and rotating of queries and keys on the CPU, forward and backward, each in one pass over
// memory; fused.py calls this.
//
// Backward passes keep nothing of the forward pass but its inputs: what they need of it is computed anew from a row that is
// in the cache. float32 or bfloat16 in memory, float32 in registers.
//
// Shapes: B images, R tokens of each, D channels; n heads of d channels.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "cosine.h"
#include "vectors.h"

namespace {

struct BFloat16 {
    std::uint16_t bits;
};
typedef std::uint16_t Shorts __attribute__((vector_size(2 * LANES)));

inline Vec widen(const float* p) { return load(p); }

inline Vec widen(const BFloat16* p) {
    Shorts bits;
    std::memcpy(&bits, p, sizeof bits);
    const Bits wide = __builtin_convertvector(bits, Bits) << 16;
    Vec x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
}

inline void narrow(float* p, Vec x) { store(p, x); }

// To the nearest, to the even one of two. NaN stays NaN: those that come of bfloat16 have no low bits to carry over.
inline void narrow(BFloat16* p, Vec x) {
    Bits bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Shorts half = __builtin_convertvector(bits, Shorts);
    std::memcpy(p, &half, sizeof half);
}

using Whole = std::integral_constant<Index, LANES>;

// The next `count` channels, zeros in the other lanes.
template <typename T, typename Count>
inline Vec take(const T* p, Count count) {
    if constexpr (std::is_same_v<Count, Whole>) return widen(p);
    T part[LANES] = {};
    std::copy_n(p, static_cast<Index>(count), part);
    return widen(part);
}

template <typename T, typename Count>
inline void put(T* p, Vec x, Count count) {
    if constexpr (std::is_same_v<Count, Whole>) return narrow(p, x);
    T part[LANES];
    narrow(part, x);
    std::copy_n(part, static_cast<Index>(count), p);
}

// Calls f(c, count) for channels c to c + count, until all are done.
template <typename F>
inline void for_channels(Index channels, F f) {
    Index c = 0;
    for (; c + LANES <= channels; c += LANES) f(c, Whole());
    if (c < channels) f(c, channels - c);
}

// Calls f(i) for i < count; each costs `channels` numbers of work.
template <typename F>
void in_parallel(Index count, Index channels, F f) {
    at::parallel_for(0, count, std::max<Index>(1, 32768 / std::max<Index>(channels, 1)), [&](Index begin, Index end) {
        for (Index i = begin; i < end; i++) f(i);
    });
}

// ---- GEGLU: value * gelu(gate) of rows (value, gate) ----

struct Normal {
    Vec below, bell;  // the normal distribution up to x, and exp(-x²/2)
};

// Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", 7.1.26: 7.5e-8 at most, as PyTorch's own.
inline Normal normal(Vec x) {
    Normal result;
    result.bell = exp2(x * x * -0.72134752f);
    const Vec t = 1.f / (1.f + 0.23164189f * larger(x, -x));
    Vec p = all(1.061405429f);
    for (float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = p * t + c;
    const Vec above = 0.5f * p * t * result.bell;
    result.below = x > 0 ? 1.f - above : above;
    return result;
}

template <typename T>
void geglu_forward(const T* hidden, T* out, Index rows, Index channels) {
    in_parallel(rows, channels, [=](Index row) {
        const T *value = hidden + row * 2 * channels, *gate = value + channels;
        T* to = out + row * channels;
        for_channels(channels, [=](Index c, auto count) {
            const Vec x = take(gate + c, count);
            put(to + c, take(value + c, count) * x * normal(x).below, count);
        });
    });
}

template <typename T>
void geglu_backward(const T* gradient, const T* hidden, T* d_hidden, Index rows, Index channels) {
    in_parallel(rows, channels, [=](Index row) {
        const T *value = hidden + row * 2 * channels, *gate = value + channels, *from = gradient + row * channels;
        T *d_value = d_hidden + row * 2 * channels, *d_gate = d_value + channels;
        for_channels(channels, [=](Index c, auto count) {
            const Vec x = take(gate + c, count), g = take(from + c, count);
            const auto [below, bell] = normal(x);
            put(d_value + c, g * x * below, count);
            put(d_gate + c, g * take(value + c, count) * (below + x * bell * 0.39894228f), count);
        });
    });
}

// ---- RMSNorm: x / sqrt(mean of x² + eps) * scale, a scale for each image ----

template <typename T>
void norm_forward(const T* x, const float* scale, T* out, Index images, Index tokens, Index channels, float eps) {
    in_parallel(images * tokens, channels, [=](Index row) {
        const T* from = x + row * channels;
        const float* factors = scale + row / tokens * channels;
        T* to = out + row * channels;
        Vec squares = {};
        for_channels(channels, [&](Index c, auto count) {
            const Vec y = take(from + c, count);
            squares += y * y;
        });
        const float inverse = 1 / std::sqrt(sum_of(squares) / channels + eps);
        for_channels(channels, [=](Index c, auto count) {
            put(to + c, take(from + c, count) * inverse * take(factors + c, count), count);
        });
    });
}

// The gradient of scale is left in shares, (B, blocks, D): one for each `block` tokens of an image, so that neither threads
// nor the other images change the order of the additions.
template <typename T>
void norm_backward(const T* gradient, const T* x, const float* scale, T* d_x, float* shares, Index images, Index tokens,
                   Index channels, Index block, float eps) {
    const Index blocks = (tokens + block - 1) / block;
    in_parallel(images * blocks, block * channels, [=](Index task) {
        const Index image = task / blocks, first = task % blocks * block;
        const float* factors = scale + image * channels;
        float* share = shares + task * channels;
        std::fill_n(share, channels, 0.f);
        for (Index token = first; token < std::min(first + block, tokens); token++) {
            const Index row = (image * tokens + token) * channels;
            const T *from = x + row, *g = gradient + row;
            T* to = d_x + row;
            Vec squares = {}, products = {};
            for_channels(channels, [&](Index c, auto count) {
                const Vec y = take(from + c, count);
                squares += y * y;
                products += y * take(g + c, count) * take(factors + c, count);
            });
            const float inverse = 1 / std::sqrt(sum_of(squares) / channels + eps);
            const float back = sum_of(products) / channels * inverse * inverse * inverse;
            for_channels(channels, [=](Index c, auto count) {
                const Vec y = take(from + c, count), d = take(g + c, count) * inverse;
                put(share + c, take(share + c, count) + d * y, count);
                put(to + c, d * take(factors + c, count) - y * back, count);
            });
        }
    });
}

// ---- Queries or keys (B, R, n, d), normalized and rotated: cosine.h ----

// As floats, with zeros up to a multiple of LANES.
template <typename T>
void unpack(const T* from, Index channels, float* to) {
    for_channels(channels, [=](Index c, auto count) { store(to + c, take(from + c, count)); });
}

template <typename T>
void pack(const float* from, Index channels, T* to) {
    for_channels(channels, [=](Index c, auto count) { put(to + c, load(from + c), count); });
}

struct Heads {
    const float *norm, *cos, *sin;  // (n), and (R, n, pairs)
    Index images, tokens, heads, channels, pairs;

    Index padded() const { return (channels + LANES - 1) / LANES * LANES; }
    Cosine at(Index token, Index head) const {
        const Index angles = (token * heads + head) * pairs;
        return {norm[head], cos + angles, sin + angles, pairs, padded()};
    }
};

template <typename T>
void cosine_forward(const T* x, T* out, Index block, const Heads& h) {
    const Index rows = h.images * h.tokens, blocks = (rows + block - 1) / block;
    in_parallel(blocks, block * h.heads * h.channels, [=](Index task) {
        std::vector<float> token(h.padded()), made(h.padded());
        for (Index row = task * block; row < std::min((task + 1) * block, rows); row++)
            for (Index head = 0; head < h.heads; head++) {
                const Index at = (row * h.heads + head) * h.channels;
                unpack(x + at, h.channels, token.data());
                h.at(row % h.tokens, head).apply(token.data(), made.data());
                pack(made.data(), h.channels, out + at);
            }
    });
}

// The gradient of norm is left in shares, (B, blocks, n), as that of scale is by norm_backward.
template <typename T>
void cosine_backward(const T* gradient, const T* x, T* d_x, float* shares, Index block, const Heads& h) {
    const Index blocks = (h.tokens + block - 1) / block;
    in_parallel(h.images * blocks, block * h.heads * h.channels, [=](Index task) {
        const Index image = task / blocks, first = task % blocks * block;
        std::vector<float> token(h.padded()), made(h.padded());
        std::fill_n(shares + task * h.heads, h.heads, 0.f);
        for (Index i = first; i < std::min(first + block, h.tokens); i++)
            for (Index head = 0; head < h.heads; head++) {
                const Index at = ((image * h.tokens + i) * h.heads + head) * h.channels;
                unpack(x + at, h.channels, token.data());
                unpack(gradient + at, h.channels, made.data());
                shares[task * h.heads + head] += h.at(i, head).go_back(token.data(), made.data());
                pack(made.data(), h.channels, d_x + at);
            }
    });
}

}  // namespace

#define FUSED_KERNELS(name, T)                                                                                       \
    extern "C" void geglu_forward_##name(const T* hidden, T* out, Index rows, Index channels) {                      \
        geglu_forward(hidden, out, rows, channels);                                                                  \
    }                                                                                                                \
    extern "C" void geglu_backward_##name(const T* gradient, const T* hidden, T* d_hidden, Index rows,               \
                                          Index channels) {                                                          \
        geglu_backward(gradient, hidden, d_hidden, rows, channels);                                                  \
    }                                                                                                                \
    extern "C" void norm_forward_##name(const T* x, const float* scale, T* out, Index images, Index tokens,          \
                                        Index channels, float eps) {                                                 \
        norm_forward(x, scale, out, images, tokens, channels, eps);                                                  \
    }                                                                                                                \
    extern "C" void norm_backward_##name(const T* gradient, const T* x, const float* scale, T* d_x, float* shares,   \
                                         Index images, Index tokens, Index channels, Index block, float eps) {       \
        norm_backward(gradient, x, scale, d_x, shares, images, tokens, channels, block, eps);                        \
    }                                                                                                                \
    extern "C" void cosine_forward_##name(const T* x, const float* norm, const float* cos, const float* sin, T* out, \
                                          Index block, Index images, Index tokens, Index heads, Index channels,      \
                                          Index pairs) {                                                             \
        cosine_forward(x, out, block, Heads{norm, cos, sin, images, tokens, heads, channels, pairs});                \
    }                                                                                                                \
    extern "C" void cosine_backward_##name(const T* gradient, const T* x, const float* norm, const float* cos,       \
                                           const float* sin, T* d_x, float* shares, Index block, Index images,       \
                                           Index tokens, Index heads, Index channels, Index pairs) {                 \
        cosine_backward(gradient, x, d_x, shares, block,                                                             \
                        Heads{norm, cos, sin, images, tokens, heads, channels, pairs});                              \
    }

FUSED_KERNELS(float32, float)
FUSED_KERNELS(bfloat16, BFloat16)
