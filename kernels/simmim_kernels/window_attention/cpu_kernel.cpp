// Attention inside windows: a window of one head fits the cache, so its scores
// are computed whole, forward and again in the backward. B batch, H W token
// rows and columns, C width, N heads, K head width, S tokens of a window.
#include <math.h>

#include <cstring>

#include "buffer.h"
#include "half.h"
#include "lanes.h"
#include "recycled_memory.h"
#include "small_product.h"
#include "window_attention.h"

namespace simmim::SIMMIM_TARGET {
namespace {

constexpr float kMasked = -100.0f;  // as published
constexpr int64_t kAlignment = 64;

// A shorter q or k is divided by this instead of its length, as torch's
// normalize does.
constexpr float kLeastLength = 1e-12f;

// Gradients of biases are summed in sections of windows, added in order: the
// result does not depend on the number of threads.
constexpr int64_t kSections = 32;

int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Float arrays of one thread, cut from one piece of memory; each starts at a
// cache line.
class Scratch {
  public:
    explicit Scratch(int64_t floats)
        : memory_(floats + kAlignment), next_(memory_ + past(memory_) / 4) {}

    float* take(int64_t floats) {
        float* taken = next_;
        next_ += padded(floats);
        std::memset(taken, 0, sizeof(float) * static_cast<size_t>(padded(floats)));
        return taken;
    }

  private:
    // Bytes from `p` to the next cache line.
    static uintptr_t past(const float* p) {
        return kAlignment - reinterpret_cast<uintptr_t>(p) % kAlignment;
    }

    Buffer<float> memory_;
    float* next_;
};

// What all windows share: sizes, and the pair biases with rows padded to whole
// lanes.
class Plan {
  public:
    explicit Plan(const WindowAttention& given)
        : a(given),
          head_width(given.sizes.width / given.sizes.num_heads),
          tokens(given.window[0] * given.window[1]),
          window_rows(given.sizes.rows / given.window[0]),
          window_columns(given.sizes.columns / given.window[1]),
          windows(given.sizes.batch * window_rows * window_columns),
          wide_tokens(padded(tokens)),
          wide_head(padded(head_width)),
          bias_((given.bias ? given.sizes.num_heads : 1) * pairs()),
          masks_(shifted() ? 4 * pairs() : 0) {
        for (int64_t head = 0; head < (a.bias ? a.sizes.num_heads : 1); ++head) {
            for (int64_t i = 0; i < tokens; ++i) {
                float* row = bias_ + head * pairs() + i * wide_tokens;
                for (int64_t j = 0; j < wide_tokens; ++j) {
                    row[j] = j >= tokens ? -INFINITY
                             : a.bias    ? a.bias[(head * tokens + i) * tokens + j]
                                         : 0.0f;
                }
            }
        }
        for (int edges = 1; shifted() && edges < 4; ++edges) make_mask(edges);
    }

    // Of q as it is read.
    float scale() const { return a.factors ? 1.0f : a.scale; }
    bool shifted() const { return a.shift[0] || a.shift[1]; }
    int64_t pairs() const { return tokens * wide_tokens; }
    const float* bias(int64_t head) const { return bias_ + (a.bias ? head : 0) * pairs(); }

    // Null where no two tokens of the window are from different regions.
    const float* mask(int64_t window) const {
        const int64_t place = window % (window_rows * window_columns);
        const int edges = (a.shift[0] && place / window_columns == window_rows - 1 ? 1 : 0) +
                          (a.shift[1] && place % window_columns == window_columns - 1 ? 2 : 0);
        return edges == 0 ? nullptr : masks_ + edges * pairs();
    }

    // Index of every token of a window among all tokens of the batch.
    void locate(int64_t window, int64_t* found) const {
        const int64_t image = window / (window_rows * window_columns);
        const int64_t place = window % (window_rows * window_columns);
        for (int64_t i = 0; i < a.window[0]; ++i) {
            int64_t r = place / window_columns * a.window[0] + i + a.shift[0];
            r = r >= a.sizes.rows ? r - a.sizes.rows : r;
            int64_t c = place % window_columns * a.window[1] + a.shift[1];
            for (int64_t j = 0; j < a.window[1]; ++j, ++c) {
                *found++ = (image * a.sizes.rows + r) * a.sizes.columns +
                           (c >= a.sizes.columns ? c - a.sizes.columns : c);
            }
        }
    }

    const WindowAttention& a;
    const int64_t head_width, tokens, window_rows, window_columns, windows;
    const int64_t wide_tokens, wide_head;  // padded to whole lanes

  private:
    // edges: 1 the last row of windows, 2 the last column, 3 both.
    void make_mask(int edges) {
        for (int64_t i = 0; i < tokens; ++i) {
            for (int64_t j = 0; j < wide_tokens; ++j) {
                const bool apart = j < tokens && region(i, edges) != region(j, edges);
                masks_[edges * pairs() + i * wide_tokens + j] = apart ? kMasked : 0.0f;
            }
        }
    }
    int region(int64_t i, int edges) const {
        const bool down = (edges & 1) && i / a.window[1] >= a.window[0] - a.shift[0];
        const bool right = (edges & 2) && i % a.window[1] >= a.window[1] - a.shift[1];
        return (down ? 1 : 0) + (right ? 2 : 0);
    }

    Buffer<float> bias_;
    Buffer<float> masks_;  // for each kind of edges
};

// One head of a token's row, widened: target [wide_head]. The same of the next
// head, which comes next, is asked for: heads of a row are neighbours, rows are
// too far apart for the processor to see the pattern.
template <class T>
void read_row(const T* source, const float* bias, float scale, float* target, int64_t width) {
    prefetch_to_read(source + width, width * static_cast<int64_t>(sizeof(T)));
    for (int64_t k = 0; k < width; k += kLanes) {
        Lanes x = load_first(source + k, width - k);
        if (bias != nullptr) x = add(x, load_first(bias + k, width - k));
        store(target + k, multiply(x, all(scale)));
    }
}

// Reads one head of the tokens of a window; `part` 0 is q, 1 is k, 2 is v.
template <class T>
class Reader {
  public:
    Reader(const Plan& plan, const int64_t* tokens, int64_t head)
        : plan_(plan), tokens_(tokens), first_(head * plan.head_width) {}

    // target [tokens, wide_head]
    void rows(int part, float scale, float* target) const {
        const int64_t C = plan_.a.sizes.width;
        const T* source = static_cast<const T*>(plan_.a.qkv) + part * C + first_;
        const float* bias = plan_.a.qkv_bias ? plan_.a.qkv_bias + part * C + first_ : nullptr;
        for (int64_t i = 0; i < plan_.tokens; ++i) {
            read_row(source + tokens_[i] * 3 * C, bias, scale, target + i * plan_.wide_head,
                     plan_.head_width);
        }
    }

    // target [wide_head, wide_tokens]
    void transposed(const float* rows, float* target) const {
        for (int64_t i = 0; i < plan_.tokens; ++i) {
            for (int64_t k = 0; k < plan_.head_width; ++k) {
                target[k * plan_.wide_tokens + i] = rows[i * plan_.wide_head + k];
            }
        }
    }

  private:
    const Plan& plan_;
    const int64_t* tokens_;
    int64_t first_;
};

// Makes rows [rows, wide] of q or k as long as `factor`; `inverse` [rows] gets
// 1 / their length, negative where that was below the least and the direction
// therefore counts for nothing.
void set_length(float* rows, int64_t count, int64_t wide, float factor, float* inverse) {
    for (int64_t i = 0; i < count; ++i, rows += wide) {
        Lanes squares = zero_lanes();
        for (int64_t k = 0; k < wide; k += kLanes) {
            const Lanes x = load(rows + k);
            squares = multiply_add(x, x, squares);
        }
        const float length = sqrtf(sum(squares));
        const bool vanishing = length < kLeastLength;
        const float share = 1.0f / (vanishing ? kLeastLength : length);
        for (int64_t k = 0; k < wide; k += kLanes) {
            store(rows + k, multiply(load(rows + k), all(share * factor)));
        }
        inverse[i] = vanishing ? -share : share;
    }
}

// Gradient of rows of q or k, in place, from that of the `rows` that set_length
// made of them. Returns the gradient of the factor.
float through_length(const float* rows, int64_t count, int64_t wide, float factor,
                     const float* inverse, float* grad) {
    float of_factor = 0.0f;
    for (int64_t i = 0; i < count; ++i, rows += wide, grad += wide) {
        Lanes products = zero_lanes();
        for (int64_t k = 0; k < wide; k += kLanes) {
            products = multiply_add(load(rows + k), load(grad + k), products);
        }
        const float along = sum(products) / factor;
        of_factor += along;
        const float share = fabsf(inverse[i]);
        const Lanes away = all(inverse[i] > 0.0f ? -share * along : 0.0f);
        for (int64_t k = 0; k < wide; k += kLanes) {
            const Lanes through = multiply(load(grad + k), all(share * factor));
            store(grad + k, multiply_add(load(rows + k), away, through));
        }
    }
    return of_factor;
}

Lanes biased(const float* score, const float* bias, const float* mask, int64_t j) {
    Lanes x = add(load(score + j), load(bias + j));
    return mask ? add(x, load(mask + j)) : x;
}

// Scores become e^(score - largest); returns the largest and the sum.
void exponentials(float* score, const float* bias, const float* mask, int64_t width, float* most,
                  float* total) {
    Lanes high = all(-INFINITY);
    for (int64_t j = 0; j < width; j += kLanes) {
        const Lanes x = biased(score, bias, mask, j);
        store(score + j, x);
        high = maximum(high, x);
    }
    *most = largest(high);
    Lanes sums = zero_lanes();
    for (int64_t j = 0; j < width; j += kLanes) {
        const Lanes e = exponential(subtract(load(score + j), all(*most)));
        store(score + j, e);
        sums = add(sums, e);
    }
    *total = sum(sums);
}

template <class T>
void forward(const WindowAttentionForward& a) {
    const Plan plan(a);
    const int64_t S = plan.tokens, K = plan.head_width, N = a.sizes.num_heads;
    const int64_t wide_S = plan.wide_tokens, wide_K = plan.wide_head;
    auto* out = static_cast<T*>(a.out);
#pragma omp parallel num_threads(a.num_threads)
    {
        Scratch scratch(3 * S * wide_K + wide_K * wide_S + plan.pairs() + wide_S + 6 * kLanes);
        float* q = scratch.take(S * wide_K);
        float* rows = scratch.take(S * wide_K);
        float* k = scratch.take(wide_K * wide_S);
        float* score = scratch.take(plan.pairs());
        float* attended = scratch.take(S * wide_K);
        float* unused = scratch.take(wide_S);
        const Buffer<int64_t> tokens(S);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < plan.windows * N; ++item) {
            const int64_t window = item / N, head = item % N;
            plan.locate(window, tokens);
            const Reader<T> reader(plan, tokens, head);
            reader.rows(0, plan.scale(), q);
            reader.rows(1, 1.0f, rows);
            if (a.factors) {
                set_length(q, S, wide_K, a.factors[head], unused);
                set_length(rows, S, wide_K, 1.0f, unused);
            }
            reader.transposed(rows, k);
            small_product({q, wide_K, 1}, k, wide_S, score, wide_S, S, wide_S, K);
            reader.rows(2, 1.0f, rows);
            const float* mask = plan.mask(window);
            float* totals = q;  // q is used up: one sum per row in its first element
            for (int64_t i = 0; i < S; ++i) {
                float most, total;
                exponentials(score + i * wide_S, plan.bias(head) + i * wide_S,
                             mask ? mask + i * wide_S : nullptr, wide_S, &most, &total);
                totals[i * wide_K] = total;
                a.log_sums[tokens[i] * N + head] = most + logf(total);
            }
            small_product({score, wide_S, 1}, rows, wide_K, attended, wide_K, S, wide_K, S);
            for (int64_t i = 0; i < S; ++i) {
                T* target = out + tokens[i] * a.sizes.width + head * K;
                const Lanes share = all(1.0f / totals[i * wide_K]);
                for (int64_t c = 0; c < K; c += kLanes) {
                    store_first(target + c, multiply(load(attended + i * wide_K + c), share),
                                K - c);
                }
            }
        }
    }
}

void add_to(float* total, const float* part, int64_t count) {
    for (int64_t e = 0; e < count; e += kLanes) {
        store_first(total + e,
                    add(load_first(total + e, count - e), load_first(part + e, count - e)),
                    count - e);
    }
}

// Writes one head's part of a gradient and adds its rows to `total` [K] where
// that is wanted.
template <class G>
void write_rows(const Plan& plan, const int64_t* tokens, const float* rows, float scale, G* target,
                float* total) {
    const int64_t K = plan.head_width;
    for (int64_t i = 0; i < plan.tokens; ++i) {
        G* row = target + tokens[i] * 3 * plan.a.sizes.width;
        prefetch_to_write(row + K, K * static_cast<int64_t>(sizeof(G)));
        for (int64_t c = 0; c < K; c += kLanes) {
            const Lanes x = multiply(load(rows + i * plan.wide_head + c), all(scale));
            store_first(row + c, x, K - c);
            if (total != nullptr) store(total + c, add(load(total + c), x));
        }
    }
}

// Probabilities P and gradient of the scores dS, from the scores and dP (in
// place). A rounded log_sum of about 100, as of cosines, is off by 1e-5:
// probabilities are made to add up to 1 again.
void score_gradients(float* score, float* grad, const float* bias, const float* mask, float log_sum,
                     int64_t width) {
    Lanes inner = zero_lanes(), total = zero_lanes();
    for (int64_t j = 0; j < width; j += kLanes) {
        const Lanes p = exponential(subtract(biased(score, bias, mask, j), all(log_sum)));
        store(score + j, p);
        inner = multiply_add(p, load(grad + j), inner);
        total = add(total, p);
    }
    const float share = 1.0f / sum(total);
    const Lanes delta = all(sum(inner) * share);
    for (int64_t j = 0; j < width; j += kLanes) {
        const Lanes p = multiply(load(score + j), all(share));
        store(score + j, p);
        store(grad + j, multiply(p, subtract(load(grad + j), delta)));
    }
}

// What a thread works in, one head of a window at a time.
struct Workspace {
    explicit Workspace(const Plan& plan)
        : scratch(5 * plan.tokens * plan.wide_head + plan.wide_head * plan.wide_tokens +
                  2 * plan.pairs() + 2 * plan.wide_tokens),
          tokens(plan.tokens) {
        const int64_t rows = plan.tokens * plan.wide_head;
        q = scratch.take(rows);
        k = scratch.take(rows);
        v = scratch.take(rows);
        grad = scratch.take(rows);
        result = scratch.take(rows);
        across = scratch.take(plan.wide_head * plan.wide_tokens);
        score = scratch.take(plan.pairs());
        grad_score = scratch.take(plan.pairs());
        of_q = scratch.take(plan.wide_tokens);
        of_k = scratch.take(plan.wide_tokens);
    }

    Scratch scratch;
    Buffer<int64_t> tokens;     // where the window's tokens are
    float *q, *k, *v, *grad;    // [S, wide_head]; grad is that of the output
    float* result;              // [S, wide_head]
    float* across;              // [wide_head, wide_S]
    float *score, *grad_score;  // [S, wide_S]
    float *of_q, *of_k;         // [S]: 1 / length, of a cosine
};

template <class T, class G>
void backward_head(const WindowAttentionBackward& a, const Plan& plan, const float* mask,
                   int64_t head, const Workspace& w, float* bias_part, float* qkv_part,
                   float* factor_part) {
    const int64_t S = plan.tokens, K = plan.head_width, N = a.sizes.num_heads, C = a.sizes.width;
    const int64_t wide_S = plan.wide_tokens, wide_K = plan.wide_head;
    const Reader<T> reader(plan, w.tokens, head);
    reader.rows(0, plan.scale(), w.q);
    reader.rows(1, 1.0f, w.k);
    reader.rows(2, 1.0f, w.v);
    const float* factor = a.factors ? a.factors + head : nullptr;
    if (factor) {
        set_length(w.q, S, wide_K, *factor, w.of_q);
        set_length(w.k, S, wide_K, 1.0f, w.of_k);
    }
    const G* grad_out = static_cast<const G*>(a.grad_out) + head * K;
    for (int64_t i = 0; i < S; ++i) {
        read_row(grad_out + w.tokens[i] * C, nullptr, 1.0f, w.grad + i * wide_K, K);
    }
    reader.transposed(w.k, w.across);
    small_product({w.q, wide_K, 1}, w.across, wide_S, w.score, wide_S, S, wide_S, K);
    reader.transposed(w.v, w.across);
    small_product({w.grad, wide_K, 1}, w.across, wide_S, w.grad_score, wide_S, S, wide_S, K);
    for (int64_t i = 0; i < S; ++i) {
        score_gradients(w.score + i * wide_S, w.grad_score + i * wide_S,
                        plan.bias(head) + i * wide_S, mask ? mask + i * wide_S : nullptr,
                        a.log_sums[w.tokens[i] * N + head], wide_S);
    }
    if (bias_part) add_to(bias_part, w.grad_score, plan.pairs());
    G* target = static_cast<G*>(a.grad_qkv) + head * K;
    small_product({w.grad_score, wide_S, 1}, w.k, wide_K, w.result, wide_K, S, wide_K, S);
    if (factor) {
        const float found = through_length(w.q, S, wide_K, *factor, w.of_q, w.result);
        if (factor_part) *factor_part += found;
    }
    write_rows(plan, w.tokens, w.result, plan.scale(), target, qkv_part);
    small_product({w.grad_score, 1, wide_S}, w.q, wide_K, w.result, wide_K, S, wide_K, S);
    if (factor) through_length(w.k, S, wide_K, 1.0f, w.of_k, w.result);
    write_rows(plan, w.tokens, w.result, 1.0f, target + C, qkv_part ? qkv_part + wide_K : nullptr);
    small_product({w.score, 1, wide_S}, w.grad, wide_K, w.result, wide_K, S, wide_K, S);
    write_rows(plan, w.tokens, w.result, 1.0f, target + 2 * C,
               qkv_part ? qkv_part + 2 * wide_K : nullptr);
}

// Sums over windows, one per section.
class Parts {
  public:
    Parts(bool wanted, int64_t sections, int64_t floats)
        : floats_(floats),
          memory_(wanted ? take_memory(sizeof(float) * static_cast<size_t>(sections * floats))
                         : nullptr) {}
    ~Parts() {
        if (memory_) give_back_memory(memory_);
    }
    Parts(const Parts&) = delete;
    Parts& operator=(const Parts&) = delete;

    float* of(int64_t section) const {
        return memory_ ? static_cast<float*>(memory_->data) + section * floats_ : nullptr;
    }
    void clear(int64_t section) const {
        if (memory_) std::memset(of(section), 0, sizeof(float) * static_cast<size_t>(floats_));
    }

  private:
    int64_t floats_;
    MemoryBlock* memory_;
};

template <class T, class G>
void backward(const WindowAttentionBackward& a) {
    const Plan plan(a);
    const int64_t S = plan.tokens, K = plan.head_width, N = a.sizes.num_heads, C = a.sizes.width;
    const int64_t wide_S = plan.wide_tokens, wide_K = plan.wide_head, pairs = plan.pairs();
    const int64_t per_section = (plan.windows + kSections - 1) / kSections;
    const int64_t sections = per_section ? (plan.windows + per_section - 1) / per_section : 0;
    const Parts of_bias(a.grad_bias != nullptr, sections, N * pairs);
    const Parts of_qkv(a.grad_qkv_bias != nullptr, sections, N * 3 * wide_K);
    const Parts of_factors(a.grad_factors != nullptr, sections, N);
#pragma omp parallel num_threads(a.num_threads)
    {
        const Workspace workspace(plan);
#pragma omp for schedule(dynamic)
        for (int64_t section = 0; section < sections; ++section) {
            float* bias_part = of_bias.of(section);
            float* qkv_part = of_qkv.of(section);
            float* factor_part = of_factors.of(section);
            of_bias.clear(section);
            of_qkv.clear(section);
            of_factors.clear(section);
            const int64_t end = (section + 1) * per_section;
            for (int64_t window = section * per_section;
                 window < (end < plan.windows ? end : plan.windows); ++window) {
                plan.locate(window, workspace.tokens);
                for (int64_t head = 0; head < N; ++head) {
                    backward_head<T, G>(a, plan, plan.mask(window), head, workspace,
                                        bias_part ? bias_part + head * pairs : nullptr,
                                        qkv_part ? qkv_part + head * 3 * wide_K : nullptr,
                                        factor_part ? factor_part + head : nullptr);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < (a.grad_bias ? N * S : 0); ++row) {
            float* target = a.grad_bias + row * S;
            std::memset(target, 0, sizeof(float) * static_cast<size_t>(S));
            for (int64_t section = 0; section < sections; ++section) {
                add_to(target, of_bias.of(section) + row * wide_S, S);
            }
        }
    }
    for (int64_t head = 0; head < (a.grad_factors ? N : 0); ++head) {
        double total = 0.0;
        for (int64_t section = 0; section < sections; ++section) {
            total += of_factors.of(section)[head];
        }
        a.grad_factors[head] = static_cast<float>(total);
    }
    for (int64_t row = 0; row < (a.grad_qkv_bias ? N * 3 : 0); ++row) {
        float* target = a.grad_qkv_bias + row % 3 * C + row / 3 * K;
        std::memset(target, 0, sizeof(float) * static_cast<size_t>(K));
        for (int64_t section = 0; section < sections; ++section) {
            add_to(target, of_qkv.of(section) + row * wide_K, K);
        }
    }
}

template <class T>
void backward_of(const WindowAttentionBackward& a) {
    a.grad_dtype == 0 ? backward<T, float>(a) : backward<T, T>(a);
}

}  // namespace

void window_attention_forward(const WindowAttentionForward& a) { SIMMIM_OF_TYPE(a.dtype, forward); }

void window_attention_backward(const WindowAttentionBackward& a) {
    SIMMIM_OF_TYPE(a.dtype, backward_of);
}

}  // namespace simmim::SIMMIM_TARGET
