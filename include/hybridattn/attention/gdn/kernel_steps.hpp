// Gated DeltaNet as kernels, token by token in exact arithmetic. Numbers in brackets are equations of gdn.hpp.
//
// A block has a value head of a sequence and a tile of the columns of its state [K, V]. Columns of a state do not meet before they are
// summed, so every block goes through all tokens of its sequence alone. Tokens go through shared memory in pieces.
#ifndef HYBRIDATTN_ATTENTION_GDN_KERNEL_STEPS_HPP
#define HYBRIDATTN_ATTENTION_GDN_KERNEL_STEPS_HPP

#include <hybridattn/attention/gdn/kernel_place.hpp>

// g++ takes the int sizes of arrays in templates for conversions.
#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"
#endif

namespace hybridattn::inline HYBRIDATTN_ABI::gdn {

// Entries first .. first + width - 1 of head h of `count` tokens from n on, times `factor`. Entries that the head does not have, and those
// of an empty view, are zeros. Neighbouring threads read neighbouring addresses.
template <int threads, class T, int tokens, int width, class From>
HYBRIDATTN_DEVICE void load_entries(T (&to)[tokens][width], View<From const, 3> from, Index n, int count, Index h, Index first, T factor) {
  for (int i = simt::thread_id(); i < count * width; i += threads) {
    int const t = i / width, d = i % width;
    to[t][d] = !from.empty() && first + d < from.extent(2) ? factor * from(n + t, h, first + d) : T(0);
  }
}
// The gates of a piece.
template <class T, int tokens> struct PieceGates {
  T decay[tokens], beta[tokens];

  HYBRIDATTN_DEVICE void load(Inputs<In<T>> const& x, Index n, int count, Index h) {
    int const t = simt::thread_id();
    if (t >= count) return;
    decay[t] = std::exp(x.g(n + t, h));
    beta[t] = x.beta(n + t, h);
  }
};

// ---- forward

template <class T> struct ForwardStepsParams {
  Inputs<In<T>> x;   // initial_state may be empty
  View<T, 3> o;
  View<wide_t<T>, 3> error;         // may be empty
  View<wide_t<T>, 4> final_state;   // may be empty, may be the initial state
  View<Sequence const, 1> sequences;
  Index tiles;    // of columns
  Index group;    // value heads of a key head
  T scale;
  bool extends;   // sequences without past tokens start from zeros, those without new tokens keep their state
};

// o, the errors and the final state, for keys with room for K entries. A column of the state has a few neighbouring lanes of one warp.
// Lane c of them has the rows c, c + lanes, ... of the column in registers.
template <class T, int K> struct ForwardSteps {
  static constexpr int threads = 128, tokens = 64 / static_cast<int>(sizeof(T));
  static constexpr int lanes = K * sizeof(T) <= 1024 ? 4 : 8, columns = threads / lanes, entries = K / lanes;
  using Params = ForwardStepsParams<T>;
  struct Shared {
    T q[tokens][K], k[tokens][K], v[tokens][columns];   // q times scale
    PieceGates<T, tokens> gates;
  };

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    if (p.extends && at.sequence.length == 0) return;
    T state[entries];
    read(p, at, state);
    for (Index t = 0; t < at.sequence.length; t += tokens) {
      int const count = at.count(t, tokens);
      load(shared, p, at, at.sequence.start + t, count);
      simt::sync_block();
      for (int i = 0; i < count; ++i) step(shared, p, at, at.sequence.start + t + i, i, state);
      simt::sync_block();   // all have read the piece
    }
    write(p.final_state, at, state);
  }

 private:
  static HYBRIDATTN_DEVICE int lane() { return simt::thread_id() % lanes; }
  static HYBRIDATTN_DEVICE int row(int j) { return lane() + j * lanes; }
  static HYBRIDATTN_DEVICE Index column(Place const& at) { return at.column + simt::thread_id() / lanes; }

  static HYBRIDATTN_DEVICE void read(Params const& p, Place const& at, T (&state)[entries]) {
    View<wide_t<T> const, 4> const from = p.x.initial_state;
    bool const is_given = !from.empty() && column(at) < from.extent(3) && !(p.extends && at.sequence.past == 0);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int j = 0; j < entries; ++j) state[j] = is_given && row(j) < from.extent(2) ? from(at.number, at.head, row(j), column(at)) : T(0);
  }
  static HYBRIDATTN_DEVICE void write(View<wide_t<T>, 4> to, Place const& at, T const (&state)[entries]) {
    if (to.empty() || column(at) >= to.extent(3)) return;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int j = 0; j < entries; ++j)
      if (row(j) < to.extent(2)) to(at.number, at.head, row(j), column(at)) = state[j];
  }
  static HYBRIDATTN_DEVICE void load(Shared& shared, Params const& p, Place const& at, Index n, int count) {
    load_entries<threads>(shared.q, p.x.q, n, count, at.head / p.group, 0, p.scale);
    load_entries<threads>(shared.k, p.x.k, n, count, at.head / p.group, 0, T(1));
    load_entries<threads>(shared.v, p.x.v, n, count, at.head, at.column, T(1));
    shared.gates.load(p.x, n, count, at.head);
  }
  // Token n, the i-th one of the piece.
  static HYBRIDATTN_DEVICE void step(Shared const& shared, Params const& p, Place const& at, Index n, int i, T (&state)[entries]) {
    T const decay = shared.gates.decay[i];
    T with_k = 0, with_q = 0;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int j = 0; j < entries; ++j) {
      state[j] *= decay;                                                                        // (1)
      with_k += shared.k[i][row(j)] * state[j];
    }
    T const error = shared.v[i][simt::thread_id() / lanes] - simt::sum_lanes<lanes>(with_k);    // (2)
    T const delta = shared.gates.beta[i] * error;
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int j = 0; j < entries; ++j) {
      state[j] += shared.k[i][row(j)] * delta;                                      // (3)
      with_q += shared.q[i][row(j)] * state[j];
    }
    T const o = simt::sum_lanes<lanes>(with_q);                                                 // (4)
    if (lane() != 0 || column(at) >= p.o.extent(2)) return;
    p.o(n, at.head, column(at)) = o;
    if (!p.error.empty()) p.error(n, at.head, column(at)) = error;
  }
};

// ---- backward

template <class T> struct BackwardStepsParams {
  Inputs<In<T>> x;
  View<wide_t<T> const, 3> error;
  View<T const, 3> d_o;                       // may be empty
  View<wide_t<T> const, 4> d_final_state;     // may be empty
  View<T, 3> d_v;
  View<wide_t<T>, 4> d_initial_state;         // may be empty
  View<T, 5> states;   // [pieces, HV, tiles, elements of a thread, threads]: the state before every piece
  View<T, 4> parts;    // [tiles, N, HV, 2 K + 1]: what a tile adds to d_q, d_k and d_beta
  View<double, 4> paths;   // [tiles, N, HV, 8]: what 8 parts of a tile add to d_g / exp(g); terms of both signs that nearly cancel
  View<Sequence const, 1> sequences;
  Index tiles, group;   // as in forward
  T scale;
};

// d_v, d_initial_state, and the parts of all other gradients, for keys with room for K entries. A warp has all rows of a few columns of
// S and X. Lane l has the rows l, l + 32, ... of these columns in registers. The warps' sums over columns meet in shared memory.
// A first walk keeps S before every piece of tokens. The second walk goes through the pieces and their tokens in reverse, and forms S
// before each token from the piece's first S and from what the tokens between have written. Nothing divides by a decay, which may be 0.
template <class T, int K> struct BackwardSteps {
  static constexpr int warps = 8, threads = 32 * warps, tokens = 64 / static_cast<int>(sizeof(T));
  static constexpr int rows = K / 32, room = 64 / static_cast<int>(sizeof(T)) / rows, wide = room < 4 ? room : 4;   // of a thread
  static constexpr int columns = warps * wide, elements = rows * wide, sums = 2 * K + 1, paths = 8;
  using Params = BackwardStepsParams<T>;
  using Patch = T[rows][wide];
  struct Shared {
    T q[tokens][K], k[tokens][K];                         // q times scale
    T error[tokens][columns], d_o[tokens][columns];
    PieceGates<T, tokens> gates;
    T sums_of[2][warps][sums];                            // of one token, in turn; as in `parts`
    double paths_of[2][warps][paths];
  };

  // A sequence's first piece in `states`. Sequences may have any lengths, so a few places stay unused.
  static HYBRIDATTN_HD Index first_piece(Index start, Index number) { return start / tokens + number; }
  static Index count_pieces(Sequences const& s) { return s.tokens() / tokens + s.count(); }

  static HYBRIDATTN_DEVICE void run(Shared& shared, Params const& p) {
    Place const at{p.sequences, p.tiles, columns};
    Index const pieces = ceil_div(at.sequence.length, Index{tokens});
    keep_states(shared, p, at, pieces);
    Patch X, first, S;
    read(p.d_final_state, at, X);
    for (Index piece = pieces; piece-- > 0;) {
      int const count = load(shared, p, at, piece);
      simt::sync_block();
      recall(p, at, piece, first);
      for (int i = count; i-- > 0;) {
        form_state(shared, first, i, S);
        step(shared, p, at, at.sequence.start + piece * tokens + i, i, S, X);
      }
    }
    write(p.d_initial_state, at, X);
  }

 private:
  static HYBRIDATTN_DEVICE int row(int r) { return simt::lane() + 32 * r; }
  static HYBRIDATTN_DEVICE int column(int c) { return simt::warp() * wide + c; }   // of the tile
  template <class F> static HYBRIDATTN_DEVICE void for_each_element(F f) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int r = 0; r < rows; ++r) {
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int c = 0; c < wide; ++c) f(r, c);
    }
  }

  // A state or its gradient; zeros where there is none.
  static HYBRIDATTN_DEVICE void read(View<wide_t<T> const, 4> from, Place const& at, Patch& x) {
    for_each_element([&](int r, int c) {
      bool const is_given = !from.empty() && row(r) < from.extent(2) && at.column + column(c) < from.extent(3);
      x[r][c] = is_given ? from(at.number, at.head, row(r), at.column + column(c)) : T(0);
    });
  }
  static HYBRIDATTN_DEVICE void write(View<wide_t<T>, 4> to, Place const& at, Patch const& x) {
    for_each_element([&](int r, int c) {
      bool const is_wanted = !to.empty() && row(r) < to.extent(2) && at.column + column(c) < to.extent(3);
      if (is_wanted) to(at.number, at.head, row(r), at.column + column(c)) = x[r][c];
    });
  }
  static HYBRIDATTN_DEVICE T& kept(Params const& p, Place const& at, Index piece, int r, int c) {
    return p.states(first_piece(at.sequence.start, at.number) + piece, at.head, at.tile, r * wide + c, simt::thread_id());
  }
  static HYBRIDATTN_DEVICE void recall(Params const& p, Place const& at, Index piece, Patch& S) {
    for_each_element([&](int r, int c) { S[r][c] = kept(p, at, piece, r, c); });
  }
  // Returns the number of the piece's tokens.
  static HYBRIDATTN_DEVICE int load(Shared& shared, Params const& p, Place const& at, Index piece) {
    int const count = at.count(piece * tokens, tokens);
    Index const n = at.sequence.start + piece * tokens, key_head = at.head / p.group;
    load_entries<threads>(shared.q, p.x.q, n, count, key_head, 0, p.scale);
    load_entries<threads>(shared.k, p.x.k, n, count, key_head, 0, T(1));
    load_entries<threads>(shared.error, p.error, n, count, at.head, at.column, T(1));
    load_entries<threads>(shared.d_o, p.d_o, n, count, at.head, at.column, T(1));
    shared.gates.load(p.x, n, count, at.head);
    return count;
  }

  static HYBRIDATTN_DEVICE void keep_states(Shared& shared, Params const& p, Place const& at, Index pieces) {
    Patch first, S;
    read(p.x.initial_state, at, S);
    for (Index piece = 0; piece < pieces; ++piece) {
      for_each_element([&](int r, int c) {
        kept(p, at, piece, r, c) = S[r][c];
        first[r][c] = S[r][c];
      });
      if (piece == pieces - 1) return;
      int const count = load(shared, p, at, piece);
      simt::sync_block();
      form_state(shared, first, count, S);
      simt::sync_block();   // all have read the piece
    }
  }
  // S after `count` tokens of a piece: what each token wrote, from the last one back, as often decayed as tokens follow it.   (1), (3)
  static HYBRIDATTN_DEVICE void form_state(Shared const& shared, Patch const& first, int count, Patch& S) {
    T left = 1;
    for_each_element([&](int r, int c) { S[r][c] = 0; });
    for (int i = count; i-- > 0;) {
      T const beta = left * shared.gates.beta[i];
      for_each_element([&](int r, int c) { S[r][c] += shared.k[i][row(r)] * (beta * shared.error[i][column(c)]); });
      left *= shared.gates.decay[i];
    }
    for_each_element([&](int r, int c) { S[r][c] += left * first[r][c]; });
  }

  // u[c] becomes its sum over the lanes of the warp. Lanes first exchange halves of what they have left, until each one has one column.
  static HYBRIDATTN_DEVICE void sum_lanes_of_each(T (&u)[wide]) {
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int half = wide / 2, bit = 1; half > 0; half /= 2, bit *= 2) {
      bool const has_upper = (simt::lane() & bit) != 0;
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int c = 0; c < half; ++c) {
        T const given = has_upper ? u[c] : u[c + half];
        u[c] = (has_upper ? u[c + half] : u[c]) + simt::shuffle_xor(given, bit);
      }
    }
    T sum = u[0];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int step = wide; step < 32; step *= 2) sum += simt::shuffle_xor(sum, step);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < wide; ++c) u[c] = simt::shuffle(sum, wide == 4 ? c / 2 + c % 2 * 2 : c);
  }

  // Token n, the i-th one of the piece, with S before it and X after it. X becomes the gradient of S.
  static HYBRIDATTN_DEVICE void step(Shared& shared, Params const& p, Place const& at, Index n, int i, Patch const& S, Patch& X) {
    T const decay = shared.gates.decay[i], beta = shared.gates.beta[i];
    T u[wide] = {}, d_beta = 0, through = 0;
    for_each_element([&](int r, int c) {
      X[r][c] += shared.q[i][row(r)] * shared.d_o[i][column(c)];
      u[c] += shared.k[i][row(r)] * X[r][c];
    });
    sum_lanes_of_each(u);
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int c = 0; c < wide; ++c) {
      d_beta += u[c] * shared.error[i][column(c)];                                              // (5)
      u[c] *= beta;
      Index const v = at.column + column(c);
      if (simt::lane() == 0 && v < p.d_v.extent(2)) p.d_v(n, at.head, v) = u[c];
    }
    auto& to = shared.sums_of[i % 2];
    HYBRIDATTN_UNROLL_IN_KERNEL
    for (int r = 0; r < rows; ++r) {
      T const k = shared.k[i][row(r)];
      T d_q = 0, d_k = 0;
      HYBRIDATTN_UNROLL_IN_KERNEL
      for (int c = 0; c < wide; ++c) {
        T const error = shared.error[i][column(c)], decayed = decay * S[r][c];
        d_q += (decayed + k * (beta * error)) * shared.d_o[i][column(c)];                       // (6)
        d_k += beta * error * X[r][c] - decayed * u[c];
        X[r][c] -= k * u[c];
        through += X[r][c] * S[r][c];
        X[r][c] *= decay;
      }
      to[simt::warp()][row(r)] = d_q;
      to[simt::warp()][K + row(r)] = d_k;
    }
    double const path = simt::sum_lanes<32 / paths>(static_cast<double>(through));              // (7)
    auto& to_paths = shared.paths_of[i % 2][simt::warp()];
    if (simt::lane() % (32 / paths) == 0) to_paths[simt::lane() / (32 / paths)] = path;
    if (simt::lane() == 0) to[simt::warp()][2 * K] = d_beta;
    simt::sync_block();
    add_warps(to, p.parts.row(at.tile, n, at.head));
    add_warps(shared.paths_of[i % 2], p.paths.row(at.tile, n, at.head));
  }
  template <class S, int count> static HYBRIDATTN_DEVICE void add_warps(S const (&of_warps)[warps][count], S* to) {
    for (int i = simt::thread_id(); i < count; i += threads) {
      S sum = 0;
      for (int warp = 0; warp < warps; ++warp) sum += of_warps[warp][i];
      to[i] = sum;
    }
  }
};

// d_q and d_k [N, H, K]: the parts of the value heads of the group and of their tiles, added in order. A thread has an entry of both.
template <class T> struct SumKeyGradients {
  View<T const, 4> parts;
  View<T, 3> d_q, d_k;
  Index room, group;   // of the keys in `parts`; value heads of a key head
  T scale;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const H = d_q.extent(1), K = d_q.extent(2), n = i / (H * K), hk = i / K % H, a = i % K;
    T q = 0, k = 0;
    for (Index h = hk * group; h < (hk + 1) * group; ++h)
      for (Index tile = 0; tile < parts.extent(0); ++tile) {
        q += parts(tile, n, h, a);
        k += parts(tile, n, h, room + a);
      }
    d_q(n, hk, a) = scale * q;
    d_k(n, hk, a) = k;
  }
};
// d_beta and d_g [N, HV] from the parts of the tiles, added in order. A thread has a head of a token.
template <class T> struct SumGateGradients {
  View<T const, 4> parts;
  View<double const, 4> paths;
  View<wide_t<T> const, 2> g;
  View<wide_t<T>, 2> d_g, d_beta;
  Index room;

  HYBRIDATTN_HD void operator()(Index i) const {
    Index const n = i / g.extent(1), h = i % g.extent(1);
    T beta = 0;
    double through = 0;
    for (Index tile = 0; tile < parts.extent(0); ++tile) {
      beta += parts(tile, n, h, 2 * room);
      for (Index j = 0; j < paths.extent(3); ++j) through += paths(tile, n, h, j);
    }
    d_beta(n, h) = beta;
    d_g(n, h) = std::exp(g(n, h)) * static_cast<T>(through);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI::gdn

#if defined(__GNUC__) && !defined(__clang__) && !HYBRIDATTN_CUDA
#pragma GCC diagnostic pop
#endif
#endif
