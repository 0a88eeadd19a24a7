// Neighborhood attention on the CPU, forward and backward; neighborhood_attention.py compiles and calls this.
//
// No halo is written to memory. A task is a band of query rows of one image and head; within it, a strip of LANES
// neighbouring queries of one row (or of ROWS rows, which share what they load) is taken at once:
//
//   scores   lanes are queries. The keys that they see at one distance dx are LANES neighbouring numbers of a row of
//            keys that lies channel by channel, so a score costs a load and a multiply-add for LANES queries.
//   sums     lanes are channels: output = sum of weights times values, and the three gradients likewise.
//
// The softmax is in base 2, and its gradient that of Dao et al. 2022, "FlashAttention", arXiv 2205.14135, algorithm 4:
// weights are computed again from the logarithm of their sum. Gradients of keys and values are added up by even bands
// first, then by odd ones, so that no two tasks at work share a row, and the order of additions is always the same.
//
// Queries and keys that are still to be scaled and rotated are, a band at a time, and their gradients go the same way back.
//
// Shapes: B images, h x w tokens, n heads, d channels (a multiple of 16, next to each other), kh x kw window.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <type_traits>
#include <vector>

#include "cosine.h"
#include "vectors.h"

namespace {

constexpr int ROWS = LANES == 16 ? 2 : 1;
constexpr int GROUP = 8;  // distances whose scores are kept in registers together
constexpr Index AHEAD = 8;  // tokens, from one that is asked for to the one at work
constexpr float NEVER = -INFINITY;

// Asks for `count` floats that are needed soon: tokens lie far apart, and the processor does not foresee the next one.
inline void fetch(const float* from, Index count) {
    for (Index i = 0; i < count; i += LANES) __builtin_prefetch(from + i);
}

struct Problem {
    Index B, h, w, n, d, kh, kw, pairs;
};

// A tensor (B, h, w, n, d) by its strides, in elements; that of channels is 1.
template <typename T>
struct Tokens {
    T* data;
    Index b, y, x, head;
    Tokens(T* data, const Index* s) : data(data), b(s[0]), y(s[1]), x(s[2]), head(s[3]) {}
    T* at(Index image, Index which, Index row, Index column) const {
        return data + image * b + which * head + row * y + column * x;
    }
};
using In = Tokens<const float>;
using Out = Tokens<float>;

inline Index window_start(Index i, Index kernel, Index length) {
    return std::clamp<Index>(i - kernel / 2, 0, length - kernel);
}

inline Index round_up(Index x, Index unit) { return (x + unit - 1) / unit * unit; }

// The memory of a task, taken piece by piece. It is allocated once for all tasks of a thread: the system would map memory
// that each task allocates and frees page by page, every time.
class Space {
    float *next, *end;

  public:
    Space(float* begin, Index count) : next(begin), end(begin + count) {}
    float* take(Index count) {
        float* taken = next;
        next += count;
        assert(next <= end);
        return taken;
    }
};

// How queries and keys are to be normalized and rotated. Without norm (a null pointer) nothing is to be done.
struct Cosines {
    const float *norm, *cos, *sin;  // (n), and (h, w, n, pairs)

    Cosine at(const Problem& p, Index head, Index y, Index x) const {
        const Index angles = ((y * p.w + x) * p.n + head) * p.pairs;
        return {norm[head], cos + angles, sin + angles, p.pairs, p.d};
    }
};

// Some rows of the queries or keys of one image and head, ready to attend: what is given, where nothing is to be done.
struct Ready {
    In tokens;

    static Index size(Index rows, const Problem& p) { return rows * p.w * p.d; }

    Ready(Space& space, const In& from, const Cosines& cosines, Index image, Index head, Index first, Index last,
          const Problem& p)
        : tokens(from) {
        if (!cosines.norm) return;
        float* data = space.take(size(last - first, p));
        for (Index y = first; y < last; y++)
            for (Index x = 0; x < p.w; x++) {
                fetch(from.at(image, head, y, x + AHEAD), p.d);
                cosines.at(p, head, y, x).apply(from.at(image, head, y, x), data + ((y - first) * p.w + x) * p.d);
            }
        const Index strides[] = {0, p.w * p.d, p.d, 0};
        tokens = In(data - first * p.w * p.d, strides);
    }
};

// LANES x LANES: the low and high halves of pairs of rows are interleaved as often as LANES can be halved.
inline void transpose(Vec (&x)[LANES]) {
    Mask low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i / 2 + (i % 2) * LANES;
        high[i] = low[i] + LANES / 2;
    }
    for (int step = 1; step < LANES; step *= 2) {
        Vec y[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + LANES / 2], low);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + LANES / 2], high);
        }
        std::memcpy(x, y, sizeof y);
    }
}

// `count` tokens, `stride` apart, to channel-by-channel order (d, ld), times `factor`; zeros fill up the last LANES.
void by_channels(const float* tokens, Index stride, Index count, Index d, float factor, float* to, Index ld) {
    for (Index x = 0; x < count; x += LANES)
        for (Index c = 0; c < d; c += LANES) {
            Vec block[LANES];
            for (int i = 0; i < LANES; i++) {
                block[i] = x + i < count ? load(tokens + (x + i) * stride + c) * factor : Vec{};
                fetch(tokens + (x + i + LANES) * stride + c, LANES);
            }
            transpose(block);
            for (int i = 0; i < LANES; i++) store(to + (c + i) * ld + x, block[i]);
        }
}

// Some rows of one image and head, channel by channel, with `pad` zeros at either side: (rows, d, ld).
struct Rows {
    Index first, d, pad, ld;
    float* data;

    static Index padding(const Problem& p) { return round_up(p.kw, LANES); }
    static Index width(const Problem& p) { return round_up(p.w, LANES) + 2 * padding(p); }
    static Index size(Index rows, const Problem& p) { return rows * p.d * width(p); }

    Rows(Space& space, const In& from, Index image, Index head, Index first, Index last, const Problem& p)
        : first(first), d(p.d), pad(padding(p)), ld(width(p)), data(space.take(size(last - first, p))) {
        for (Index y = first; y < last; y++) {
            float* row = data + (y - first) * d * ld;
            for (Index c = 0; c < d; c++) {
                std::fill_n(row + c * ld, pad, 0.f);
                std::fill_n(row + c * ld + ld - pad, pad, 0.f);
            }
            by_channels(from.at(image, head, y, 0), from.x, p.w, d, 1.f, row + pad, ld);
        }
    }
    const float* at(Index y, Index x) const { return data + (y - first) * d * ld + pad + x; }
};

// LANES queries of a row, from column x on: how far away the keys are that any of them sees.
struct Strip {
    Index x, count, low, high;  // distances low .. high
    std::vector<Mask> seen;     // at each distance, the lanes that see a key there

    Strip(Index x, const Problem& p) : x(x), count(std::min<Index>(LANES, p.w - x)), low(p.kw), high(-p.kw) {
        for (Index i = x; i < x + count; i++) {
            low = std::min(low, window_start(i, p.kw, p.w) - i);
            high = std::max(high, window_start(i, p.kw, p.w) + p.kw - 1 - i);
        }
        for (Index distance = low; distance <= high; distance++) {
            Mask sees = {};
            for (Index i = 0; i < count; i++) {
                const Index offset = x + i + distance - window_start(x + i, p.kw, p.w);
                sees[i] = offset >= 0 && offset < p.kw ? -1 : 0;
            }
            seen.push_back(sees);
        }
    }
    Index distances() const { return high - low + 1; }
};

std::vector<Strip> strips_of(const Problem& p) {
    std::vector<Strip> strips;
    for (Index x = 0; x < p.w; x += LANES) strips.emplace_back(x, p);
    return strips;
}

// Scores or weights of a strip: for each row of keys, LANES numbers for each distance, and a zero before and behind,
// so that two neighbours can be summed up together over all that either of them sees.
struct Weights {
    float* data;
    Index width = 0, low = 0;
    static Index size(const Problem& p) { return p.kh * (2 * p.kw + 1) * LANES; }
    Weights(Space& space, const Problem& p) : data(space.take(size(p))) {}
    void shape(const Strip& strip) { width = strip.distances() + 2, low = strip.low; }
    float* row(Index key_row) const { return data + (key_row * width + 1) * LANES; }
    float* at(Index key_row, Index distance) const { return row(key_row) + (distance - low) * LANES; }
};

// R rows of LANES queries (d, LANES) with the keys at G distances: scores to to[row], LANES each.
template <int R, int G>
void dots(const float* const* queries, const float* keys, Index ld, Index d, float* const* to) {
    Vec sum[R][G] = {};
    for (Index c = 0; c < d; c++) {
        Vec query[R];
        for (int r = 0; r < R; r++) query[r] = load(queries[r] + c * LANES);
        for (int g = 0; g < G; g++) {
            const Vec key = load(keys + c * ld + g);
            for (int r = 0; r < R; r++) sum[r][g] += query[r] * key;
        }
    }
    for (int r = 0; r < R; r++)
        for (int g = 0; g < G; g++) store(to[r] + g * LANES, sum[r][g]);
}

template <int R>
void dots_of(Index count, const float* const* queries, const float* keys, Index ld, Index d, float* const* to) {
    constexpr decltype(&dots<R, 1>) all[] = {dots<R, 1>, dots<R, 2>, dots<R, 3>, dots<R, 4>,
                                             dots<R, 5>, dots<R, 6>, dots<R, 7>, dots<R, 8>};
    // Equal shares: ten distances as 5 + 5, which have more sums at work than 8 + 2.
    const Index groups = (count + GROUP - 1) / GROUP;
    float* next[R];
    std::copy_n(to, R, next);
    for (Index i = 0, done = 0; i < groups; i++) {
        const Index share = count * (i + 1) / groups - done;
        all[share - 1](queries, keys + done, ld, d, next);
        for (auto& p : next) p += share * LANES;
        done += share;
    }
}

// What a strip of one to ROWS rows of queries needs: scores with all keys in its windows.
void strip_scores(const Strip& strip, Index rows, const Index* starts, const float* const* queries, const Rows& keys,
                  const Problem& p, Weights* const* weights) {
    const Index last = starts[rows - 1] + p.kh;
    for (Index y = starts[0]; y < last; y++) {
        const float* near = keys.at(y, strip.x + strip.low);
        const float* who[ROWS];
        float* to[ROWS];
        int count = 0;
        for (Index r = 0; r < rows; r++)
            if (y >= starts[r] && y < starts[r] + p.kh) {
                who[count] = queries[r];
                to[count++] = weights[r]->row(y - starts[r]);
            }
        if (count == ROWS)
            dots_of<ROWS>(strip.distances(), who, near, keys.ld, p.d, to);
        else
            dots_of<1>(strip.distances(), who, near, keys.ld, p.d, to);
    }
}

void clear_ends(const Weights& weights, const Strip& strip, const Problem& p) {
    for (Index y = 0; y < p.kh; y++) {
        store(weights.row(y) - LANES, Vec{});
        store(weights.row(y) + strip.distances() * LANES, Vec{});
    }
}

// sum[t] (V vectors of channels of two neighbours) += weight * source, over `count` tokens of the source.
template <int V>
inline void add_up(Vec (&sum)[2][V], const float* first, const float* second, Index weight_step, const float* source,
                   Index source_step, Index count) {
    for (Index i = 0; i < count; i++) {
        const float a = first[i * weight_step], b = second[i * weight_step];
        for (int v = 0; v < V; v++) {
            const Vec x = load(source + i * source_step + v * LANES);
            sum[0][v] += a * x;
            sum[1][v] += b * x;
        }
    }
}

// Channels c to c + V * LANES of the queries of a strip: the sum over keys of weight * source, times factor.
template <int V>
void sum_over_keys(const Strip& strip, const Weights& weights, Index start, const In& source, Index image, Index head,
                   const Problem& p, Vec factor, const Out& to, Index y, Index c) {
    for (Index i = 0; i < strip.count; i += 2) {
        const Index x = strip.x + i, next = std::min(i + 1, strip.count - 1);
        const Index from = window_start(x, p.kw, p.w), until = window_start(strip.x + next, p.kw, p.w) + p.kw;
        Vec sum[2][V] = {};
        for (Index r = 0; r < p.kh; r++)
            add_up<V>(sum, weights.at(r, from - x) + i, weights.at(r, from - x - 1) + i + 1, LANES,
                      source.at(image, head, start + r, from) + c, source.x, until - from);
        for (Index t = 0; t <= next - i; t++)
            for (int v = 0; v < V; v++)
                store(to.at(image, head, y, x + t) + c + v * LANES, sum[t][v] * factor[i + t]);
    }
}

// The keys of the strip's windows: to += the sum over queries of weight * source.
template <int V>
void sum_over_queries(const Strip& strip, const Weights& weights, Index start, const In& source, Index image,
                      Index head, const Problem& p, const Out& to, Index y, Index c) {
    const Index first = window_start(strip.x, p.kw, p.w);
    const Index end = window_start(strip.x + strip.count - 1, p.kw, p.w) + p.kw;
    for (Index r = 0; r < p.kh; r++)
        for (Index key = first; key < end; key += 2) {
            // Queries that see this key or the next one; the weights hold zeros for one distance too many.
            const Index from = std::max(strip.x, key - strip.high);
            const Index until = std::min(strip.x + strip.count, key + 1 - strip.low + 1);
            float* here = to.at(image, head, start + r, key) + c;
            float* there = key + 1 < end ? here + to.x : nullptr;
            for (Index next : {2, 3}) fetch(here + next * to.x, V * LANES);
            Vec sum[2][V];
            for (int v = 0; v < V; v++) {
                sum[0][v] = load(here + v * LANES);
                sum[1][v] = there ? load(there + v * LANES) : Vec{};
            }
            // From one query to the next, the distance is one less: a step of 1 - LANES.
            add_up<V>(sum, weights.at(r, key - from) + (from - strip.x),
                      weights.at(r, key + 1 - from) + (from - strip.x), 1 - LANES,
                      source.at(image, head, y, from) + c, source.x, until - from);
            for (int v = 0; v < V; v++) {
                store(here + v * LANES, sum[0][v]);
                if (there) store(there + v * LANES, sum[1][v]);
            }
        }
}

// Calls f(V, c) for all channels, V vectors from channel c on at a time; V is a constant.
template <typename F>
void for_channels(Index d, F f) {
    Index c = 0;
    for (; c + 4 * LANES <= d; c += 4 * LANES) f(std::integral_constant<int, 4>(), c);
    for (; c + 2 * LANES <= d; c += 2 * LANES) f(std::integral_constant<int, 2>(), c);
    for (; c + LANES <= d; c += LANES) f(std::integral_constant<int, 1>(), c);
}

Vec reciprocal_of_softmax(const Strip& strip, const Weights& weights, const Problem& p, float* lse) {
    const Index distances = strip.distances();
    Vec top = all(NEVER), sum = {};
    for (Index i = 0; i < distances; i++) {
        const Mask seen = strip.seen[i];
        for (Index y = 0; y < p.kh; y++) {
            float* score = weights.row(y) + i * LANES;
            const Vec masked = seen ? load(score) : all(NEVER);
            store(score, masked);
            top = larger(top, masked);
        }
    }
    for (Index i = 0; i < distances; i++) {
        const Mask seen = strip.seen[i];
        for (Index y = 0; y < p.kh; y++) {
            float* score = weights.row(y) + i * LANES;
            const Vec weight = seen ? exp2(load(score) - top) : Vec{};
            store(score, weight);
            sum += weight;
        }
    }
    for (Index i = 0; i < strip.count; i++) lse[i] = top[i] + std::log2(sum[i]);
    return 1.f / sum;
}

struct Band {
    Index image, head, first, last, first_key, last_key;  // rows, the last ones excluded
};

// Calls `work` for the bands `offset`, `offset + step`, ... of all images and heads, with as much space as is asked for.
template <typename F>
void for_bands(const Problem& p, Index height, Index offset, Index step, Index space, F work) {
    const Index bands = (p.h + height - 1) / height, taken = bands > offset ? (bands - offset + step - 1) / step : 0;
    const Index line = 64 / sizeof(float), each = round_up(space, line);
    void* allocated = std::aligned_alloc(64, at::get_num_threads() * each * sizeof(float));
    const std::unique_ptr<float[], decltype(&std::free)> memory(static_cast<float*>(allocated), std::free);
    at::parallel_for(0, p.B * p.n * taken, 1, [&](Index begin, Index end) {
        for (Index task = begin; task < end; task++) {
            const Index which = task / taken, first = (offset + task % taken * step) * height;
            const Index last = std::min(first + height, p.h);
            const Band band{which / p.n, which % p.n, first, last, window_start(first, p.kh, p.h),
                            window_start(last - 1, p.kh, p.h) + p.kh};
            work(band, Space(memory.get() + at::get_thread_num() * each, each));
        }
    });
}

}  // namespace

extern "C" void neighborhood_forward(const float* query, const float* key, const float* value, const float* norm,
                                     const float* cos, const float* sin, float* out, float* lse, const Index* sizes,
                                     const Index* strides, float scale) {
    const Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
    const In all_q(query, strides), all_k(key, strides + 4), v(value, strides + 8);
    const Cosines cosines{norm, cos, sin};
    const Out o(out, strides + 12);
    const auto strips = strips_of(p);
    // Short bands where there are few of them for the processors: each brings its halo into order anew.
    const Index height = std::clamp<Index>(p.B * p.n * p.h / (3 * at::get_num_threads()), 4, 32);
    const Index halo = height + p.kh - 1, for_queries = ROWS * p.d * LANES;
    const Index need =
        Ready::size(height, p) + Ready::size(halo, p) + Rows::size(halo, p) + for_queries + 2 * Weights::size(p);
    for_bands(p, height, 0, 1, need, [&](const Band& band, Space space) {
        const Ready ready_q(space, all_q, cosines, band.image, band.head, band.first, band.last, p);
        const Ready ready_k(space, all_k, cosines, band.image, band.head, band.first_key, band.last_key, p);
        const In &q = ready_q.tokens, &k = ready_k.tokens;
        const Rows keys(space, k, band.image, band.head, band.first_key, band.last_key, p);
        float* queries = space.take(for_queries);
        Weights one(space, p), other(space, p);
        Weights* weights[] = {&one, &other};
        for (Index y = band.first; y < band.last; y += ROWS)
            for (const Strip& strip : strips) {
                const Index x = strip.x;
                const Index rows = std::min<Index>(ROWS, band.last - y);
                Index starts[ROWS];
                const float* by_row[ROWS];
                for (Index r = 0; r < rows; r++) {
                    starts[r] = window_start(y + r, p.kh, p.h);
                    by_row[r] = queries + r * p.d * LANES;
                    by_channels(q.at(band.image, band.head, y + r, x), q.x, strip.count, p.d, scale * float(M_LOG2E),
                                queries + r * p.d * LANES, LANES);
                    weights[r]->shape(strip);
                    clear_ends(*weights[r], strip, p);
                }
                strip_scores(strip, rows, starts, by_row, keys, p, weights);
                for (Index r = 0; r < rows; r++) {
                    float* sums = lse + ((band.image * p.n + band.head) * p.h + y + r) * p.w + x;
                    const Vec factor = reciprocal_of_softmax(strip, *weights[r], p, sums);
                    for_channels(p.d, [&](auto vectors, Index c) {
                        sum_over_keys<vectors()>(strip, *weights[r], starts[r], v, band.image, band.head, p, factor, o,
                                                 y + r, c);
                    });
                }
            }
    });
}

// Adds to the gradients of keys and values, which begin as zeros. Of the gradient of norm the shares of the queries and
// the keys of each row are written, (2, B, n, h).
extern "C" void neighborhood_backward(const float* query, const float* key, const float* value, const float* norm,
                                      const float* cos, const float* sin, const float* out, const float* gradient,
                                      const float* lse, float* d_query, float* d_key, float* d_value, float* d_norm,
                                      const Index* sizes, const Index* strides, float scale) {
    const Problem p{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
    const In all_q(query, strides), all_k(key, strides + 4), v(value, strides + 8);
    const Cosines cosines{norm, cos, sin};
    const In o(out, strides + 12), g(gradient, strides + 16);
    const Out dq(d_query, strides + 12), dk(d_key, strides + 12), dv(d_value, strides + 12);
    const auto strips = strips_of(p);
    const Index for_queries = ROWS * p.d * LANES;
    const auto finish = [&](const Band& band, const In& from, const Out& to, float* shares) {
        for (Index y = band.first; y < band.last && norm; y++) {
            float& share = shares[(band.image * p.n + band.head) * p.h + y] = 0;
            for (Index x = 0; x < p.w; x++) {
                fetch(from.at(band.image, band.head, y, x + AHEAD), p.d);
                fetch(to.at(band.image, band.head, y, x + AHEAD), p.d);
                share += cosines.at(p, band.head, y, x)
                             .go_back(from.at(band.image, band.head, y, x), to.at(band.image, band.head, y, x));
            }
        }
    };
    const auto work = [&](const Band& band, Space space) {
        const Index image = band.image, head = band.head;
        const Ready ready_q(space, all_q, cosines, image, head, band.first, band.last, p);
        const Ready ready_k(space, all_k, cosines, image, head, band.first_key, band.last_key, p);
        const In &q = ready_q.tokens, &k = ready_k.tokens;
        const Rows keys(space, k, image, head, band.first_key, band.last_key, p);
        const Rows values(space, v, image, head, band.first_key, band.last_key, p);
        float *queries = space.take(for_queries), *gradients = space.take(for_queries);
        Weights one(space, p), other(space, p), d_one(space, p), d_other(space, p);
        Weights *weights[] = {&one, &other}, *d_weights[] = {&d_one, &d_other};
        for (Index y = band.first; y < band.last; y += ROWS)
            for (const Strip& strip : strips) {
                const Index x = strip.x;
                const Index rows = std::min<Index>(ROWS, band.last - y);
                Index starts[ROWS];
                const float *by_row[ROWS], *g_by_row[ROWS];
                for (Index r = 0; r < rows; r++) {
                    starts[r] = window_start(y + r, p.kh, p.h);
                    by_row[r] = queries + r * p.d * LANES;
                    g_by_row[r] = gradients + r * p.d * LANES;
                    by_channels(q.at(image, head, y + r, x), q.x, strip.count, p.d, scale * float(M_LOG2E),
                                queries + r * p.d * LANES, LANES);
                    by_channels(g.at(image, head, y + r, x), g.x, strip.count, p.d, 1.f,
                                gradients + r * p.d * LANES, LANES);
                    weights[r]->shape(strip);
                    d_weights[r]->shape(strip);
                    clear_ends(*weights[r], strip, p);
                    clear_ends(*d_weights[r], strip, p);
                }
                strip_scores(strip, rows, starts, by_row, keys, p, weights);
                strip_scores(strip, rows, starts, g_by_row, values, p, d_weights);
                for (Index r = 0; r < rows; r++) {
                    Vec sums = {}, mean = {};  // of a lane: log2 of its sum, and gradient * output
                    for (Index i = 0; i < strip.count; i++) {
                        sums[i] = lse[((image * p.n + head) * p.h + y + r) * p.w + x + i];
                        fetch(o.at(image, head, y + r, x + i + LANES), p.d);
                        mean[i] = product(o.at(image, head, y + r, x + i), g.at(image, head, y + r, x + i), p.d);
                    }
                    for (Index i = 0; i < strip.distances(); i++) {
                        const Mask seen = strip.seen[i];
                        for (Index j = 0; j < p.kh; j++) {
                            float* weight = weights[r]->row(j) + i * LANES;
                            float* d_weight = d_weights[r]->row(j) + i * LANES;
                            const Vec w = seen ? exp2(load(weight) - sums) : Vec{};
                            store(weight, w);
                            store(d_weight, w * (load(d_weight) - mean) * scale);
                        }
                    }
                    for_channels(p.d, [&](auto vectors, Index c) {
                        sum_over_keys<vectors()>(strip, *d_weights[r], starts[r], k, image, head, p, all(1.f), dq,
                                                 y + r, c);
                        sum_over_queries<vectors()>(strip, *weights[r], starts[r], g, image, head, p, dv, y + r, c);
                        sum_over_queries<vectors()>(strip, *d_weights[r], starts[r], q, image, head, p, dk, y + r, c);
                    });
                }
            }
        finish(band, all_q, dq, d_norm);
    };
    // Twice the window, for a band must not reach the keys of the next but one, and the same on any number of threads,
    // for it decides the order of the additions.
    const Index height = std::max<Index>(16, 2 * p.kh);
    const Index halo = height + p.kh - 1;
    const Index need = Ready::size(height, p) + Ready::size(halo, p) + 2 * Rows::size(halo, p) + 2 * for_queries +
                       4 * Weights::size(p);
    for_bands(p, height, 0, 2, need, work);
    for_bands(p, height, 1, 2, need, work);
    for_bands(p, height, 0, 1, 0, [&](const Band& band, Space) { finish(band, all_k, dk, d_norm + p.B * p.n * p.h); });
}
