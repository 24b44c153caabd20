// What decodes one row, from product to product, by one call: threads meet between its steps and go on.
//
// A step is a list of int64_t: its code, its length, and the fields of the struct of its name. A *place* is the address
// of a tensor: given[place], none where it is -1, and below that an offset into memory of this call. Real numbers are
// the bits of a float.
#include "rows.h"

#include <atomic>
#include <vector>

using namespace spikeform;

namespace {

struct ProductStep {
    int64_t made, x, other, kind, K, function;                                          // Maker
    int64_t weight, bias, weight_kind, bias_kind, centred, eps, gain_offset;            // Norm
    int64_t bits, nearest, low, high;                                                   // Gates
    int64_t threshold, populations, limit, resolution, rounding;                        // Population of the above
    Encoding how;
    int64_t residual, out_kind, count;
    // and `count` times:
    struct Of {
        int64_t weight, scale, zero, bias, bias_kind, table, shift, N, out;
    };
};
struct AppendStep {
    int64_t gif, kind, size, groups, heads;            // heads of queries: 0, they are not turned
    int64_t keys, values, place, slots, key_group, key_token, value_group, value_token;  // caches; strides in bytes
    int64_t key, key_stride, value, value_stride, query, query_stride, turned, cos, sin;  // strides in bytes
    int64_t key_table, value_table, limit, resolution, rounding, populations, wide, value_steps;
};
struct AttentionStep {
    Sizes sizes;
    int64_t gif, q, k, v, mask, out, scaling, hidden;
    int64_t query, key, value, probability;  // thresholds; of GIF q_top, k_multiple, v_multiple, q_multiple
    int64_t populations, limit, peak, resolution, rounding, bits, nearest, low, high, wide;  // levels, .., steps
};
enum Code { PRODUCT, APPEND, ATTENTION };

float real_of(int64_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// The addresses of a call, and how far its threads are.
class Call {
  public:
    Call(void* const* given, uint8_t* own) : given_(given), own_(own) {}
    template <class T = void>
    T* at(int64_t place) const {
        void* found = place >= 0 ? given_[place] : place == -1 ? nullptr : own_ - 2 - place;
        return static_cast<T*>(found);
    }

  private:
    void* const* given_;
    uint8_t* own_;
};

// run(begin, end) over shares of 0..count: large ones first, so that each lies together, then smaller ones, so that no
// thread waits long for another. `next` counts what is taken.
template <class Run>
void shares(std::atomic<int64_t>& next, int64_t count, int64_t threads, const Run& run) {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < count) {
        const int64_t end = std::min(count, begin + std::max<int64_t>(1, (count - begin) / (2 * threads)));
        if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
        run(begin, end);
        begin = next.load(std::memory_order_relaxed);
    }
}

// The codes of a row for one matrix after the other, made by the thread that needs them.
class Lines {
  public:
    Lines(const ProductStep& step, const Call& call)
        : step_(step), of_(reinterpret_cast<const ProductStep::Of*>(&step + 1)), call_(call),
          bytes_(line_bytes(step.how, step.K)), room_(scratch<int8_t>(0, size_t(step.count) * bytes_)),
          lines_(scratch<Line>(3, size_t(step.count))), known_(scratch<int64_t>(4, size_t(step.count))) {
        std::fill(known_, known_ + step.count, -1);
    }
    Matrix matrix(int64_t p) const {
        const auto& m = of_[p];
        return {call_.at(m.weight), call_.at<float>(m.scale), call_.at<int16_t>(m.zero), call_.at(m.bias), m.bias_kind,
                call_.at<float>(m.table), call_.at<int8_t>(m.shift), m.N, call_.at(m.out)};
    }
    const Line& line(int64_t p) {
        const Matrix own = matrix(p);
        for (int64_t q = 0; q < step_.count && known_[p] < 0; q++)
            if (known_[q] == q && alike(own, matrix(q))) known_[p] = q;
        if (known_[p] < 0) {
            encode_line(step_.how, own, row(), step_.kind, step_.K, room_ + size_t(p) * bytes_, lines_[p]);
            known_[p] = p;
        }
        return lines_[known_[p]];
    }

  private:
    bool alike(const Matrix& a, const Matrix& b) const {
        const int64_t count = step_.how.gif ? step_.K : step_.how.populations;
        if (a.shift != b.shift && (!a.shift || !b.shift || std::memcmp(a.shift, b.shift, size_t(step_.K)))) return false;
        return a.table == b.table || !std::memcmp(a.table, b.table, size_t(count) * sizeof(float));
    }
    const void* row() {
        const ProductStep& s = step_;
        if (s.made == AS_IT_IS) return call_.at(s.x);
        if (made_) return made_;
        made_ = scratch<float>(2, size_t(s.K));
        make_row({s.made, call_.at(s.x), call_.at(s.other), s.kind, s.K, s.function,
                  {call_.at(s.weight), call_.at(s.bias), s.weight_kind, s.bias_kind, s.centred, real_of(s.eps),
                   real_of(s.gain_offset)},
                  {s.bits, s.nearest, s.low, s.high},
                  {call_.at<float>(s.threshold), s.populations, s.limit, s.resolution, s.rounding}},
                 made_);
        return made_;
    }
    const ProductStep& step_;
    const ProductStep::Of* of_;
    const Call& call_;
    size_t bytes_;
    int8_t* room_;
    Line* lines_;
    int64_t* known_;  // which line is that of a matrix, or -1
    void* made_ = nullptr;
};

void product(const ProductStep& step, const Call& call, std::atomic<int64_t>& next, int64_t threads) {
    Lines lines(step, call);
    int64_t tiles = 0;
    for (int64_t p = 0; p < step.count; p++) tiles += (lines.matrix(p).N + TILE - 1) / TILE;
    shares(next, tiles, threads, [&](int64_t begin, int64_t end) {
        for (int64_t p = 0, first = 0; p < step.count && first < end; p++) {
            const Matrix m = lines.matrix(p);
            const int64_t own = (m.N + TILE - 1) / TILE, from = std::max(begin - first, int64_t(0));
            const int64_t to = std::min(end - first, own);
            first += own;
            if (from < to)
                multiply_line(step.how, m, lines.line(p), step.K, from * TILE, std::min(to * TILE, m.N),
                              call.at(step.residual), step.out_kind);
        }
    });
}

void append(const AppendStep& s, const Call& call) {
    const int64_t token = *call.at<int64_t>(s.place), bytes = s.size * (s.kind == BF16 ? 2 : 4);
    uint8_t* spare = scratch<uint8_t>(5, size_t(bytes));
    const bool turns = s.heads > 0;
    const auto head = [&](int64_t x, int64_t from, bool turn, uint8_t* turned, uint8_t* cache) {
        return Head{call.at<uint8_t>(x) + from, turn ? call.at(s.cos) : nullptr, turn ? call.at(s.sin) : nullptr, s.kind,
                    s.size, turned, cache};
    };
    const auto put = [&](const Head& own, int64_t table, int64_t steps, int64_t group) {
        if (s.gif)
            put_head(own, Burst{nullptr, call.at<float>(table) + group * s.size, s.limit, steps});
        else
            put_head(own, Population{call.at<float>(table), s.populations, s.limit, s.resolution, s.rounding}, s.wide);
    };
    for (int64_t g = 0; g < s.groups; g++) {
        uint8_t* key = call.at<uint8_t>(s.keys) + g * s.key_group + token * s.key_token;
        uint8_t* value = call.at<uint8_t>(s.values) + g * s.value_group + token * s.value_token;
        put(head(s.key, g * s.key_stride, turns, spare, key), s.key_table, s.resolution, g);
        put(head(s.value, g * s.value_stride, false, spare, value), s.value_table, s.value_steps, g);
    }
    for (int64_t h = 0; h < s.heads; h++)
        put(head(s.query, h * s.query_stride, true, call.at<uint8_t>(s.turned) + h * bytes, nullptr), s.key_table, 1, 0);
}

void attention(const AttentionStep& s, const Call& call, std::atomic<int64_t>& next, int64_t threads) {
    const Tensors x = {call.at(s.q), call.at(s.k), call.at(s.v), call.at(s.mask), call.at(s.out), real_of(s.scaling),
                       real_of(s.hidden)};
    const Tasks tasks = tasks_of(s.sizes, threads);
    const auto of = [&](int64_t threshold, int64_t most) {
        return Population{call.at<float>(threshold), s.populations, most, s.resolution, s.rounding};
    };
    const OatNeurons oat = {of(s.query, s.limit), of(s.key, s.limit), of(s.value, s.limit), of(s.probability, s.peak),
                            {s.bits, s.nearest, s.low, s.high}, s.wide};
    const GifNeurons gif = {{call.at<float>(s.query), call.at<float>(s.probability), s.limit, s.resolution},
                            call.at<float>(s.key), call.at<float>(s.value), s.peak};
    shares(next, tasks.count(), threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) s.gif ? attend(s.sizes, x, gif, tasks, i) : attend(s.sizes, x, oat, tasks, i);
    });
}

}  // namespace

// steps: all of `length` numbers, `count` of them; room: bytes of its own memory. 0; or, where a token is to go into a
// cache beyond its end, how long that is, and nothing was done.
SF_API int64_t spikeform_chain(const int64_t* steps, int64_t length, int64_t count, int64_t room, void* const* given,
                               int64_t threads) {
    const Call call(given, scratch<uint8_t>(8, size_t(room)));
    for (const int64_t* step = steps; step < steps + length; step += step[1]) {
        if (step[0] != APPEND) continue;
        const auto& append = *reinterpret_cast<const AppendStep*>(step + 2);
        const int64_t token = *call.at<int64_t>(append.place);
        if (token < 0 || token >= append.slots) return append.slots;
    }
    std::vector<std::atomic<int64_t>> taken(size_t(count) * 8);  // each on a line of the cache of its own
    for (const int64_t* step = steps; step < steps + length; step += step[1]) {
        if (step[0] != PRODUCT) continue;
        const auto& product = *reinterpret_cast<const ProductStep*>(step + 2);
        const auto* of = reinterpret_cast<const ProductStep::Of*>(&product + 1);
        const int64_t bits = product.how.weights == NIBBLES ? 4 : product.how.weights == BYTES ? 8
                             : product.how.weights == BF16  ? 16 : 32;
        for (int64_t p = 0; p < product.count; p++) use_large_pages(call.at(of[p].weight), of[p].N * product.K * bits / 8);
    }
#pragma omp parallel num_threads(threads)
    {
        auto* next = taken.data();
        for (const int64_t* step = steps; step < steps + length; step += step[1], next += 8) {
            const int64_t* fields = step + 2;
            if (step[0] == PRODUCT) product(*reinterpret_cast<const ProductStep*>(fields), call, *next, threads);
            if (step[0] == ATTENTION) attention(*reinterpret_cast<const AttentionStep*>(fields), call, *next, threads);
            if (step[0] == APPEND && next->fetch_add(1) == 0) append(*reinterpret_cast<const AppendStep*>(fields), call);
#pragma omp barrier
        }
    }
    return 0;
}

// Adds to `count` numbers, each in a place of its own.
SF_API void spikeform_advance(int64_t* const* counters, int64_t count, int64_t by) {
    for (int64_t i = 0; i < count; i++) *counters[i] += by;
}
