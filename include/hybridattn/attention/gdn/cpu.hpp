// The gated delta rule on the CPU: the tasks of forward, backward and decoding, and the memory of each thread.
#ifndef HYBRIDATTN_ATTENTION_GDN_CPU_HPP
#define HYBRIDATTN_ATTENTION_GDN_CPU_HPP

#include <hybridattn/attention/gdn/cpu_decay.hpp>
#include <hybridattn/attention/gdn/cpu_forward.hpp>
#include <hybridattn/attention/gdn/cpu_rebuild.hpp>
#include <hybridattn/attention/gdn/cpu_reverse.hpp>
#include <hybridattn/attention/gdn/cpu_step.hpp>
#include <hybridattn/attention/gdn/types.hpp>
#include <hybridattn/backend/cpu/cpu.hpp>
#include <hybridattn/tensor/in_float.hpp>

namespace hybridattn::inline HYBRIDATTN_ABI {
namespace gdn {
namespace detail {

// Memory of one thread in forward. K and V are rounded up to whole panels.
template <class T> struct ForwardScratch {
  Index K, V;
  T *state, *panels;          // [K, V] in panels; the rows of the panels in turn
  TokenRows<T> q, k, v, o, error;  // one block each, for rows that are not used in place

  static Index size(Index K, Index V) {
    return size_sum(size_product(K, V), panels_in_turn * panel_rows * panel_width<T> + block_tokens * (2 * K + 3 * V));
  }
  ForwardScratch(T* memory, Index K_, Index V_) : K(K_), V(V_) {
    auto const take = [&](Index count) { return std::exchange(memory, memory + count); };
    auto const take_rows = [&](Index width) { return TokenRows<T>{take(block_tokens * width), width}; };
    state = take(K * V), panels = take(panels_in_turn * panel_rows * panel_width<T>);
    q = take_rows(K), k = take_rows(K), v = take_rows(V), o = take_rows(V), error = take_rows(V);
  }
};

template <class T>
void forward_head(Config const& c, Sequence sequence, Index i, Index h, Inputs<In<T>> const& x, Outputs<Out<T>> const& y,
                  Saved<Out<T>> const& saved, ForwardScratch<T> const& scratch) {
  Index const K = scratch.K, hk = h / (c.num_value_heads / c.num_heads);
  T carry = Carry<T>::start;
  Gates<T> gates;
  ForwardTerms<T> terms;
  read_state(x.initial_state, i, h, K, scratch.V, scratch.state);
  for (Index b = 0; b < count_blocks(sequence); ++b) {
    TokenBlock const block = block_of(sequence, b);
    ForwardRows<T> rows{.groups = block.groups(),
                        .K = K,
                        .V = scratch.V,
                        .q = rows_to_read(x.q, block, hk, scratch.q),
                        .k = rows_to_read(x.k, block, hk, scratch.k),
                        .v = rows_to_read(x.v, block, h, scratch.v),
                        .o = rows_to_write(y.o, block, h, scratch.o),
                        .error = {nullptr, 0}};
    if (!saved.error.empty()) rows.error = rows_to_write(saved.error, block, h, scratch.error);
    read_gates(x.g, x.beta, block, h, gates);
    carry = forward_terms(gates, static_cast<T>(c.scale), rows, carry, terms);
    forward_block(terms, rows, scratch.state, scratch.panels);
    write_back(y.o, block, h, scratch.o);
    write_back(saved.error, block, h, scratch.error);
  }
  write_state(scratch.state, carry, i, h, K, y.final_state);
}

// Memory of one thread in backward. K and V are rounded up to whole panels.
template <class T> struct BackwardScratch {
  Index K, V;
  T *gradient, *state;               // X [K, V] and S^T [V, K], in panels
  T* panels;                         // the rows of the panels in turn
  T* crossing;                       // of one block, for d_g
  TokenRows<T> q, k, error, d_o, d_v;     // one block each, for rows that are not used in place
  TokenRows<T> d_q, d_k;                  // one block of one value head
  T* state_error;                    // X e of all tokens of a head
  T* gradients;                      // an X of each block, for d_g
  Handover<T>* handover;             // one for each block

  static Index size(Index K, Index V, Index longest) {
    Index const states = size_product(2 + ceil_div(longest, block_tokens), K, V);   // and the states of the blocks
    return size_sum(states, (panels_in_turn * panel_rows + block_groups * crossing_rows) * panel_width<T> + block_tokens * (4 * K + 3 * V) +
                                round_up(longest, group_tokens) * K);
  }
  BackwardScratch(T* memory, Handover<T>* handover_, Index K_, Index V_, Index longest) : K(K_), V(V_), handover(handover_) {
    auto const take = [&](Index count) { return std::exchange(memory, memory + count); };
    auto const take_rows = [&](Index width) { return TokenRows<T>{take(block_tokens * width), width}; };
    gradient = take(K * V), state = take(K * V), panels = take(panels_in_turn * panel_rows * panel_width<T>);
    crossing = take(block_groups * crossing_rows * panel_width<T>);
    q = take_rows(K), k = take_rows(K), error = take_rows(V), d_o = take_rows(V), d_v = take_rows(V);
    d_q = take_rows(K), d_k = take_rows(K);
    state_error = take(round_up(longest, group_tokens) * K);
    gradients = memory;
  }
};

// The arguments of one call of backward.
template <class T> struct BackwardCall {
  Config const& c;
  Inputs<In<T>> x;
  Saved<In<T>> saved;
  Outputs<In<T>> d_y;
  Inputs<Out<T>> d_x;

  Index key_head(Index h) const { return h / (c.num_value_heads / c.num_heads); }
  BackwardRows<T> rows(TokenBlock block, Index h, BackwardScratch<T> const& scratch) const {
    Index const hk = key_head(h);
    return {.groups = block.groups(),
            .K = scratch.K,
            .V = scratch.V,
            .q = rows_to_read(x.q, block, hk, scratch.q),
            .k = rows_to_read(x.k, block, hk, scratch.k),
            .error = rows_to_read(saved.error, block, h, scratch.error),
            .d_o = rows_to_read(d_y.o, block, h, scratch.d_o),
            .d_v = rows_to_write(d_x.v, block, h, scratch.d_v)};
  }
};

// Writes d_v, d_beta, d_initial_state and the handover. Returns a function that computes <S_0, X_0>.
template <class T> auto reverse_sweep(BackwardCall<T> const& call, Sequence sequence, Index i, Index h, BackwardScratch<T> const& scratch) {
  T const scale = static_cast<T>(call.c.scale);
  T carry = Carry<T>::start, since_fresh = 1;
  Gates<T> gates;
  ReverseTerms<T> terms;
  read_state(call.d_y.final_state, i, h, scratch.K, scratch.V, scratch.gradient);
  for (Index b = count_blocks(sequence); b-- > 0;) {
    TokenBlock const block = block_of(sequence, b);
    BackwardRows<T> const rows = call.rows(block, h, scratch);
    read_gates(call.x.g, call.x.beta, block, h, gates);
    carry = reverse_terms(gates, scale, rows, carry, terms);
    DecayPaths<T>& paths = scratch.handover[b].paths;
    paths.decay = gates.after[0];
    paths.fresh = fresh_group(paths.decay, rows.groups, since_fresh);
    paths.gradient = scratch.gradients + b * scratch.K * scratch.V;
    paths.carry = terms.carry.before[paths.fresh];
    reverse_block(terms, rows, scratch.gradient, scratch.panels, scratch.state_error + b * block_tokens * rows.K, paths);
    finish_reverse(gates, terms, scale, rows, block, h, call.d_x.beta, scratch.handover[b]);
    write_back(call.d_x.v, block, h, scratch.d_v);
  }
  write_state(scratch.gradient, carry, i, h, scratch.K, call.d_x.initial_state);
  return [=] { return dot_state(call.x.initial_state, i, h, scratch.K, scratch.gradient, carry); };
}

// Writes d_q and d_k. Returns <S_T, d_final_state>.
template <class T>
double forward_sweep(BackwardCall<T> const& call, Sequence sequence, Index i, Index h, bool first, BackwardScratch<T> const& scratch) {
  T carry = Carry<T>::start;
  Gates<T> gates;
  RebuildTerms<T> terms;
  read_transposed(call.x.initial_state, i, h, scratch.K, scratch.V, scratch.state);
  for (Index b = 0; b < count_blocks(sequence); ++b) {
    TokenBlock const block = block_of(sequence, b);
    BackwardRows<T> const rows = call.rows(block, h, scratch);
    rows_to_read(View<T const, 3>(call.d_x.v), block, h, scratch.d_v);   // written by the reverse sweep
    read_gates(call.x.g, call.x.beta, block, h, gates);
    carry = rebuild_terms(gates, static_cast<T>(call.c.scale), carry, terms);
    rebuild_block(terms, scratch.handover[b], rows, scratch.state, scratch.state_error + b * block_tokens * rows.K, scratch.panels,
                  scratch.d_q, scratch.d_k, scratch.crossing);
    paths_across(scratch.crossing, rows.groups, scratch.handover[b].gradient, scratch.handover[b].paths);
    finish_rebuild<T>(scratch.d_q, scratch.d_k, block, call.key_head(h), first, call.d_x.q, call.d_x.k);
  }
  return dot_transposed(call.d_y.final_state, i, h, scratch.V, scratch.state, carry);
}

}  // namespace detail

// A task is a value head of a sequence: heads are independent of each other.
template <class T> void forward(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<Out<T>> y, Saved<Out<T>> saved) {
  Index const K = detail::padded<T>(c.key_dim), V = detail::padded<T>(c.value_dim);
  Tensor<T, 2, Cpu> memory{cpu, {Index{cpu.threads()}, detail::ForwardScratch<T>::size(K, V)}};
  View<T, 2> const scratch = out(memory);
  parallel_for(cpu, s.count() * c.num_value_heads, [&](Index task, int thread) {
    Index const i = task / c.num_value_heads, h = task % c.num_value_heads;
    detail::forward_head(c, s[static_cast<std::size_t>(i)], i, h, x, y, saved, detail::ForwardScratch<T>{scratch.row(thread), K, V});
  });
}

// A task is a key head of a sequence: key heads are independent of each other. The value heads of a key head add to its d_q and d_k
// one after the other.
template <class T>
void backward(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> x, Outputs<In<T>>, Saved<In<T>> saved, Outputs<In<T>> d_y,
              Inputs<Out<T>> d_x) {
  Index const K = detail::padded<T>(c.key_dim), V = detail::padded<T>(c.value_dim);
  Index const longest = s.longest(), threads = cpu.threads(), group = c.num_value_heads / c.num_heads;
  Tensor<T, 2, Cpu> memory{cpu, {threads, detail::BackwardScratch<T>::size(K, V, longest)}};
  Tensor<detail::Handover<T>, 2, Cpu> handover{cpu, {threads, ceil_div(longest, detail::block_tokens)}};
  View<T, 2> const rows = out(memory);
  View<detail::Handover<T>, 2> const blocks = out(handover);
  detail::BackwardCall<T> const call{c, x, saved, d_y, d_x};
  parallel_for(cpu, s.count() * c.num_heads, [&](Index task, int thread) {
    Index const i = task / c.num_heads, hk = task % c.num_heads;
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    detail::BackwardScratch<T> const scratch{rows.row(thread), blocks.row(thread), K, V, longest};
    for (Index h = hk * group; h < (hk + 1) * group; ++h) {
      auto const before = detail::reverse_sweep(call, sequence, i, h, scratch);
      double const after = detail::forward_sweep(call, sequence, i, h, h == hk * group, scratch);
      auto const paths = [&](Index b) -> detail::DecayPaths<T> const& { return scratch.handover[b].paths; };
      detail::DecayGradients<T>::write(sequence, h, paths, before, after, d_x.g);
    }
  });
}

namespace detail {

// Computes token n in head h, and updates the head's state [K, V].
template <class T> void step_token(Config const& c, Inputs<In<T>> const& x, Index n, Index h, View<T, 4> states, Index i, View<T, 3> o) {
  Index const hk = h / (c.num_value_heads / c.num_heads);
  T const *q = x.q.row(n, hk), *k = x.k.row(n, hk);
  T const scale = static_cast<T>(c.scale), decay = decay_of<T>(cpu::broadcast(x.g(n, h)))[0];
  T const qk = cpu::sum_vectors<T>(c.key_dim, [&](cpu::Slot<T> slot) HYBRIDATTN_INLINE_LAMBDA { return slot.get(q) * slot.get(k); });
  step_head<T>({q, k, x.v.row(n, h), decay, x.beta(n, h), scale, scale * qk, states.row(i, h, 0), o.row(n, h), c.key_dim, states.stride[2]},
               c.value_dim);
}

}  // namespace detail

// x holds one token for each of B sequences: q, k [B, H, K], v [B, HV, V], g, beta [B, HV]; x.initial_state is not used.
// state [B, HV, K, V] is updated in place, o is [B, HV, V].
template <class T> void step(Cpu& cpu, Config const& c, Inputs<In<T>> x, View<T, 4> state, View<T, 3> o) {
  parallel_for(cpu, o.extent(0) * c.num_value_heads, [&](Index task, int) {
    Index const b = task / c.num_value_heads, h = task % c.num_value_heads;
    detail::step_token(c, x, b, h, state, b, o);
  });
}

// Updates state and computes o [N, HV, V]. One new token of a sequence is a step in place; several new tokens are a forward from the
// state to the state.
template <class T> void extend(Cpu& cpu, Config const& c, Sequences const& s, Inputs<In<T>> x, View<T, 4> state, View<T, 3> o) {
  check_fits(s, state.extent(0), std::numeric_limits<Index>::max());
  Index const K = detail::padded<T>(c.key_dim), V = detail::padded<T>(c.value_dim);
  bool const only_steps = s.longest() <= 1;
  Tensor<T, 2, Cpu> memory{cpu, {Index{cpu.threads()}, only_steps ? 0 : detail::ForwardScratch<T>::size(K, V)}};
  View<T, 2> const scratch = out(memory);
  parallel_for(cpu, s.count() * c.num_value_heads, [&](Index task, int thread) {
    Index const i = task / c.num_value_heads, h = task % c.num_value_heads;
    Sequence const sequence = s[static_cast<std::size_t>(i)];
    if (sequence.length == 0) return;
    if (sequence.length == 1) {
      for (Index k = 0; sequence.past == 0 && k < c.key_dim; ++k) std::fill_n(state.row(i, h, k), c.value_dim, T(0));
      return detail::step_token(c, x, sequence.start, h, state, i, o);
    }
    Inputs<In<T>> from = x;
    from.initial_state = sequence.past == 0 ? View<T const, 4>{} : state;
    detail::forward_head<T>(c, sequence, i, h, from, {.o = o, .final_state = state}, {}, {scratch.row(thread), K, V});
  });
}

}  // namespace gdn

template <GdnOptions O> struct On<GatedDeltaNet<O>, Cpu> : InFloat<GatedDeltaNet<O>, Cpu> {
  using InFloat<GatedDeltaNet<O>, Cpu>::forward, InFloat<GatedDeltaNet<O>, Cpu>::backward, InFloat<GatedDeltaNet<O>, Cpu>::extend;
  template <std::floating_point T>
  static void forward(Cpu& cpu, gdn::Config const& c, Sequences const& s, gdn::Inputs<In<T>> x, gdn::Outputs<Out<T>> y,
                      gdn::Saved<Out<T>> saved) {
    gdn::forward(cpu, c, s, x, y, saved);
  }
  template <std::floating_point T>
  static void backward(Cpu& cpu, gdn::Config const& c, Sequences const& s, gdn::Inputs<In<T>> x, gdn::Outputs<In<T>> y,
                       gdn::Saved<In<T>> saved, gdn::Outputs<In<T>> d_y, gdn::Inputs<Out<T>> d_x) {
    gdn::backward(cpu, c, s, x, y, saved, d_y, d_x);
  }
  template <std::floating_point T>
  static void extend(Cpu& cpu, gdn::Config const& c, Sequences const& s, gdn::Inputs<In<T>> x, gdn::Cache<Out<T>> cache,
                     gdn::Outputs<Out<T>> y) {
    gdn::extend(cpu, c, s, x, cache.state, y.o);
  }
};

}  // namespace hybridattn::inline HYBRIDATTN_ABI
#endif
