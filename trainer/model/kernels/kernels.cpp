// Response normalization (paper section 3.3) and the parameter update (section 5), one pass over memory each.
//
// Plain C interface, no torch headers: trainer/model/kernels/__init__.py compiles this file in two seconds at first use and calls it
// through ctypes. Rows are independent and nothing is reduced across them, so results do not depend on the number of
// threads. No option of -ffast-math that assumes finite numbers: NaN and infinity must come out again.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

template <typename T> struct WideOf { using type = T; };  // sums of squares in bfloat16 would lose three digits
template <> struct WideOf<bfloat16> { using type = float; };
template <typename T> using Wide = typename WideOf<T>::type;

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void store(float &to, float value) { to = value; }
inline void store(double &to, double value) { to = value; }
inline void store(bfloat16 &to, float value) {  // to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40;
    to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// y = x d^-0.75 with d = k + alpha * (sum of x^2 over size neighbors, the window cut off at the edges).
struct Norm {
    int64_t rows, maps, size;  // a row is one pixel's maps of one tower; size is 3, 5 or 7
    double alpha, k;
    bool rectify;  // a ReLU comes before: x is max(x, 0)
};

constexpr int64_t BLOCK = 16;  // rows a time: their scratch stays in the first-level cache
constexpr int64_t SMALL = 1 << 15;  // elements below which a second thread costs more than it brings

// Scratch of a block of rows. Squares and products of a row have a border of size / 2 zeros before and after its maps.
template <typename W> struct Scratch {
    std::vector<W> squares, products, scaled;
    explicit Scratch(int64_t padded, int64_t maps) : squares(BLOCK * padded), products(BLOCK * padded), scaled(BLOCK * maps) {}
};

// Runs work(first row, rows, scratch) on all blocks, which are shared among the threads.
template <typename W, typename Work> void by_blocks(const Norm &norm, int threads, Work work) {
    const int64_t blocks = (norm.rows + BLOCK - 1) / BLOCK;
    if (norm.rows * norm.maps < SMALL) threads = 1;
#pragma omp parallel num_threads(threads)
    {
        Scratch<W> scratch(norm.maps + norm.size - 1, norm.maps);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block)
            work(block * BLOCK, std::min(BLOCK, norm.rows - block * BLOCK), scratch);
    }
}

template <typename W> inline W rectified(W value, bool rectify) { return rectify && value < 0 ? W(0) : value; }

template <int SIZE, typename W> inline W window(const W *values) {
    W sum = values[0];
    for (int offset = 1; offset < SIZE; ++offset) sum += values[offset];
    return sum;
}

template <typename T, typename W> void square(const Norm &norm, const T *x, int64_t rows, W *squares) {
    const int64_t maps = norm.maps, padded = maps + norm.size - 1;
    const bool rectify = norm.rectify;
    for (int64_t row = 0; row < rows; ++row) {
        const T *__restrict from = x + row * maps;
        W *__restrict into = squares + row * padded + norm.size / 2;
        for (int64_t map = 0; map < maps; ++map) {
            const W value = rectified(widen(from[map]), rectify);
            into[map] = value * value;
        }
    }
}

template <typename T, int SIZE> void forward(const Norm &norm, const T *x, T *y, int threads) {
    using W = Wide<T>;
    const int64_t maps = norm.maps, padded = maps + SIZE - 1;
    const W alpha = W(norm.alpha), k = W(norm.k);
    const bool rectify = norm.rectify;
    by_blocks<W>(norm, threads, [=, &norm](int64_t first, int64_t rows, Scratch<W> &scratch) {
        square(norm, x + first * maps, rows, scratch.squares.data());
        for (int64_t row = 0; row < rows; ++row) {
            const T *__restrict from = x + (first + row) * maps;
            const W *__restrict squares = scratch.squares.data() + row * padded;
            T *__restrict into = y + (first + row) * maps;
            for (int64_t map = 0; map < maps; ++map) {
                const W root = std::sqrt(1 / (k + alpha * window<SIZE>(squares + map)));
                store(into[map], rectified(widen(from[map]), rectify) * root * std::sqrt(root));
            }
        }
    });
}

// dx = g d^-0.75 - 1.5 alpha x * sum(g x d^-1.75); the window is symmetric, so its transpose is itself.
template <typename T, int SIZE> void backward(const Norm &norm, const T *x, const T *gradient, T *dx, int threads) {
    using W = Wide<T>;
    const int64_t maps = norm.maps, padded = maps + SIZE - 1;
    const W alpha = W(norm.alpha), k = W(norm.k), factor = W(1.5 * norm.alpha);
    const bool rectify = norm.rectify;
    by_blocks<W>(norm, threads, [=, &norm](int64_t first, int64_t rows, Scratch<W> &scratch) {
        square(norm, x + first * maps, rows, scratch.squares.data());
        for (int64_t row = 0; row < rows; ++row) {
            const T *__restrict from = x + (first + row) * maps;
            const T *__restrict g = gradient + (first + row) * maps;
            const W *__restrict squares = scratch.squares.data() + row * padded;
            W *__restrict products = scratch.products.data() + row * padded + SIZE / 2;
            W *__restrict scaled = scratch.scaled.data() + row * maps;
            for (int64_t map = 0; map < maps; ++map) {
                const W inverse = 1 / (k + alpha * window<SIZE>(squares + map));
                const W root = std::sqrt(inverse);
                scaled[map] = widen(g[map]) * root * std::sqrt(root);
                products[map] = scaled[map] * inverse * rectified(widen(from[map]), rectify);
            }
        }
        for (int64_t row = 0; row < rows; ++row) {
            const T *__restrict from = x + (first + row) * maps;
            const W *__restrict products = scratch.products.data() + row * padded;
            const W *__restrict scaled = scratch.scaled.data() + row * maps;
            T *__restrict into = dx + (first + row) * maps;
            for (int64_t map = 0; map < maps; ++map) {
                const W value = widen(from[map]);
                const W slope = scaled[map] - factor * value * window<SIZE>(products + map);
                store(into[map], rectify && value <= 0 ? W(0) : slope);
            }
        }
    });
}

// v = momentum v - decay w - rate g; w = w + v, where decay holds the rate already.
template <typename T>
void update(T *w, T *v, const T *g, int64_t count, double momentum, double decay, double rate, int threads) {
    const T m = T(momentum), d = T(decay), r = T(rate);
    if (count < SMALL) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) {
        v[i] = m * v[i] - d * w[i] - r * g[i];
        w[i] += v[i];
    }
}

// Calls work(a null pointer to the type), for the numbers of DTYPES in kernels.py.
template <typename Work> void by_type(int type, Work work) {
    if (type == 0) work(static_cast<float *>(nullptr));
    if (type == 1) work(static_cast<double *>(nullptr));
    if (type == 2) work(static_cast<bfloat16 *>(nullptr));
}

}  // namespace

extern "C" {

// All arrays: rows x maps. The sizes are known when this is compiled, so that the loops become vectors.
void norm_forward(int type, const void *x, void *y, const Norm *norm, int threads) {
    by_type(type, [=](auto *like) {
        using T = std::remove_pointer_t<decltype(like)>;
        const auto kernel = norm->size == 3 ? forward<T, 3> : norm->size == 5 ? forward<T, 5> : forward<T, 7>;
        kernel(*norm, static_cast<const T *>(x), static_cast<T *>(y), threads);
    });
}

void norm_backward(int type, const void *x, const void *gradient, void *dx, const Norm *norm, int threads) {
    by_type(type, [=](auto *like) {
        using T = std::remove_pointer_t<decltype(like)>;
        const auto kernel = norm->size == 3 ? backward<T, 3> : norm->size == 5 ? backward<T, 5> : backward<T, 7>;
        kernel(*norm, static_cast<const T *>(x), static_cast<const T *>(gradient), static_cast<T *>(dx), threads);
    });
}

// Float and double only: weights are kept wide.
void sgd_update(int type, void *w, void *v, const void *g, int64_t count, double momentum, double decay, double rate,
                int threads) {
    if (type == 0) update((float *)w, (float *)v, (const float *)g, count, momentum, decay, rate, threads);
    if (type == 1) update((double *)w, (double *)v, (const double *)g, count, momentum, decay, rate, threads);
}
}
