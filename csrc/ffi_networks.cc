// The CPU's XLA FFI handlers of the motion networks: grid encoder, perceptrons, attention, sound.
#include "attend.h"
#include "ffi_bind.h"
#include "gated.h"
#include "listen.h"

namespace fg3dgs {
namespace {

// tables [3, entries], positions [3, n] -> encoding [3, levels, n]
ffi::Error grid_encode_cpu(ffi::ThreadPool pool, F32 tables, F32 positions, OutF32 out,
                           ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  Grid g;
  ffi::Error error = make_grid(resolutions, log2_table, bound, positions, size_of(tables), size_of(*out), &g);
  if (error.failure()) return error;
  grid_encode(g, tables.typed_data(), positions.typed_data(), out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// positions, cotangent of the encoding -> cotangent of the tables
ffi::Error grid_backward_tables_cpu(ffi::ThreadPool pool, F32 positions, F32 cotangent, OutF32 out,
                                    ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  Grid g;
  ffi::Error error = make_grid(resolutions, log2_table, bound, positions, size_of(*out), size_of(cotangent), &g);
  if (error.failure()) return error;
  grid_backward_tables(g, positions.typed_data(), cotangent.typed_data(), out->typed_data(),
                               make_executor(pool));
  return ffi::Error::Success();
}

// tables, positions, cotangent of the encoding -> cotangent of the positions
ffi::Error grid_backward_positions_cpu(ffi::ThreadPool pool, F32 tables, F32 positions, F32 cotangent, OutF32 out,
                                       ffi::Span<const int32_t> resolutions, int64_t log2_table, float bound) {
  Grid g;
  ffi::Error error = make_grid(resolutions, log2_table, bound, positions, size_of(tables), size_of(cotangent), &g);
  if (error.failure()) return error;
  grid_backward_positions(g, tables.typed_data(), positions.typed_data(), cotangent.typed_data(),
                                  out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// x [in, n], weights [sum of in * out] -> [out, n]
ffi::Error mlp_forward_cpu(ffi::ThreadPool pool, F32 x, F32 weights, OutF32 out, ffi::Span<const int32_t> sizes) {
  Mlp m;
  ffi::Error error = make_mlp(sizes, x, size_of(weights), &m);
  if (error.failure()) return error;
  mlp_forward(m, nullptr, x.typed_data(), weights.typed_data(), out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// x, weights, cotangent of the result [out, n] -> cotangents of x and of the weights
ffi::Error mlp_backward_cpu(ffi::ThreadPool pool, F32 x, F32 weights, F32 d_out, OutF32 d_x, OutF32 d_weights,
                            ffi::Span<const int32_t> sizes) {
  Mlp m;
  ffi::Error error = make_mlp(sizes, x, size_of(weights), &m);
  if (error.failure()) return error;
  mlp_backward(m, x.typed_data(), weights.typed_data(), d_out.typed_data(), d_x->typed_data(), d_weights->typed_data(),
               make_executor(pool));
  return ffi::Error::Success();
}

// start [hidden, n], x [in, n], weights -> [out, n]
ffi::Error mlp_onto_cpu(ffi::ThreadPool pool, F32 start, F32 x, F32 weights, OutF32 out,
                        ffi::Span<const int32_t> sizes) {
  Mlp m;
  ffi::Error error = make_mlp(sizes, x, size_of(weights), &m);
  if (error.failure()) return error;
  if (size_of(start) != m.sizes[1] * m.points || size_of(*out) != m.sizes[m.layers] * m.points)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "mlp: operands have the wrong shapes");
  mlp_forward(m, start.typed_data(), x.typed_data(), weights.typed_data(), out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// x [s, n], to_scores [t h, s], from_weights [m, t h], bias [m], from_hidden [l, m], past_weights [l, t h], last [o, l]
struct AttendCall {
  Attend sizes;
  AttendArrays arrays;
};

ffi::Error make_attend(F32 x, F32 to_scores, F32 from_weights, F32 bias, F32 from_hidden, F32 past_weights, F32 last,
                       int64_t heads, AttendCall* call) {
  const ffi::Error wrong(ffi::ErrorCode::kInvalidArgument, "attend: operands have the wrong shapes");
  if (x.dimensions().size() != 2 || to_scores.dimensions().size() != 2 || last.dimensions().size() != 2) return wrong;
  const int64_t seen = x.dimensions()[0], weights = to_scores.dimensions()[0], hidden = size_of(bias);
  const int64_t outputs = last.dimensions()[0], second = last.dimensions()[1];
  bool good = heads > 0 && weights > 0 && weights % heads == 0 && weights / heads <= kMostTokens;
  for (int64_t size : {seen, weights, hidden, second, outputs}) good &= size > 0 && size <= kMostRows;
  good = good && size_of(to_scores) == weights * seen && size_of(from_weights) == hidden * weights &&
         size_of(from_hidden) == second * hidden && size_of(past_weights) == second * weights;
  if (!good) return wrong;
  call->sizes = {static_cast<int>(seen),   static_cast<int>(weights / heads), static_cast<int>(heads),
                 static_cast<int>(hidden), static_cast<int>(second),          static_cast<int>(outputs),
                 x.dimensions()[1]};
  call->arrays = {x.typed_data(),           to_scores.typed_data(),    from_weights.typed_data(), bias.typed_data(),
                  from_hidden.typed_data(), past_weights.typed_data(), last.typed_data()};
  return ffi::Error::Success();
}

// -> [o, n]
ffi::Error attend_forward_cpu(ffi::ThreadPool pool, F32 x, F32 to_scores, F32 from_weights, F32 bias, F32 from_hidden,
                              F32 past_weights, F32 last, OutF32 out, int64_t heads) {
  AttendCall call;
  ffi::Error error = make_attend(x, to_scores, from_weights, bias, from_hidden, past_weights, last, heads, &call);
  if (error.failure()) return error;
  attend(call.sizes, call.arrays, out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// The same operands and the cotangent of the result -> cotangents of the operands
ffi::Error attend_backward_cpu(ffi::ThreadPool pool, F32 x, F32 to_scores, F32 from_weights, F32 bias, F32 from_hidden,
                               F32 past_weights, F32 last, F32 d_out, OutF32 d_x, OutF32 d_to_scores,
                               OutF32 d_from_weights, OutF32 d_bias, OutF32 d_from_hidden, OutF32 d_past_weights,
                               OutF32 d_last, int64_t heads) {
  AttendCall call;
  ffi::Error error = make_attend(x, to_scores, from_weights, bias, from_hidden, past_weights, last, heads, &call);
  if (error.failure()) return error;
  if (size_of(d_out) != call.sizes.last * call.sizes.points)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "attend: operands have the wrong shapes");
  attend_backward(call.sizes, call.arrays, d_out.typed_data(),
                  {d_x->typed_data(), d_to_scores->typed_data(), d_from_weights->typed_data(), d_bias->typed_data(),
                   d_from_hidden->typed_data(), d_past_weights->typed_data(), d_last->typed_data()},
                  make_executor(pool));
  return ffi::Error::Success();
}

// x [in, n], the weights of a perceptron, and of two gates their weights and condition -> a perceptron on
// [x; gate 0; gate 1 rectified]. `sizes` [3]: of the perceptron and of the gates, one behind the other with `counts`.
struct GatedCall {
  Mlp m;
  Gate gates[kGates];
};

ffi::Error make_gated(F32 x, F32 weights, const F32 (&given)[2 * kGates], ffi::Span<const int32_t> sizes,
                      ffi::Span<const int32_t> counts, GatedCall* call) {
  const ffi::Error wrong(ffi::ErrorCode::kInvalidArgument, "gated: operands have the wrong shapes");
  const auto dims = x.dimensions();
  if (counts.size() != 1 + kGates || dims.size() != 2) return wrong;
  Mlp* nets[] = {&call->m, &call->gates[0].net, &call->gates[1].net};
  size_t start = 0;
  for (int i = 0; i <= kGates; ++i) {
    if (counts[i] < 1 || start + counts[i] > sizes.size()) return wrong;
    *nets[i] = {sizes.begin() + start, counts[i] - 1, dims[1]};
    start += counts[i];
  }
  if (start != sizes.size() || !can_gate(call->m, call->gates)) return wrong;
  bool good = dims[0] == nets[1]->sizes[0] && size_of(weights) == mlp_weights(call->m);
  for (int i = 0; i < kGates; ++i) {
    const Mlp& net = call->gates[i].net;
    good &= size_of(given[2 * i]) == mlp_weights(net) && size_of(given[2 * i + 1]) == net.sizes[net.layers];
    call->gates[i].weights = given[2 * i].typed_data();
    call->gates[i].condition = given[2 * i + 1].typed_data();
    call->gates[i].rectified = i == 1;
  }
  return good ? ffi::Error::Success() : wrong;
}

ffi::Error gated_forward_cpu(ffi::ThreadPool pool, F32 x, F32 weights, F32 weights0, F32 condition0, F32 weights1,
                             F32 condition1, OutF32 out, ffi::Span<const int32_t> sizes,
                             ffi::Span<const int32_t> counts) {
  GatedCall call;
  ffi::Error error = make_gated(x, weights, {weights0, condition0, weights1, condition1}, sizes, counts, &call);
  if (error.failure()) return error;
  gated_forward(call.m, call.gates, x.typed_data(), weights.typed_data(), out->typed_data(), make_executor(pool));
  return ffi::Error::Success();
}

// The same operands and the cotangent of the result -> cotangents of the operands
ffi::Error gated_backward_cpu(ffi::ThreadPool pool, F32 x, F32 weights, F32 weights0, F32 condition0, F32 weights1,
                              F32 condition1, F32 d_out, OutF32 d_x, OutF32 d_weights, OutF32 d_weights0,
                              OutF32 d_condition0, OutF32 d_weights1, OutF32 d_condition1,
                              ffi::Span<const int32_t> sizes, ffi::Span<const int32_t> counts) {
  GatedCall call;
  ffi::Error error = make_gated(x, weights, {weights0, condition0, weights1, condition1}, sizes, counts, &call);
  if (error.failure()) return error;
  if (size_of(d_out) != call.m.sizes[call.m.layers] * call.m.points)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "gated: operands have the wrong shapes");
  const GateGradients d_gates[] = {{d_weights0->typed_data(), d_condition0->typed_data()},
                                   {d_weights1->typed_data(), d_condition1->typed_data()}};
  gated_backward(call.m, call.gates, x.typed_data(), weights.typed_data(), d_out.typed_data(), d_x->typed_data(),
                 d_weights->typed_data(), d_gates, make_executor(pool));
  return ffi::Error::Success();
}

// windows [tokens, steps, channels], then kernel and bias of every layer
ffi::Error make_listen(F32 windows, const ffi::RemainingArgs& arrays, Listen* call) {
  const ffi::Error wrong(ffi::ErrorCode::kInvalidArgument, "listen: operands have the wrong shapes");
  const auto dims = windows.dimensions();
  if (dims.size() != 3 || arrays.size() != 2 * kListenLayers) return wrong;
  *call = {windows.typed_data(), dims[0], dims[1], {}};
  for (int i = 0; i < kListenLayers; ++i) {
    const auto kernel = arrays.get<F32>(2 * i), bias = arrays.get<F32>(2 * i + 1);
    if (!kernel.has_value() || !bias.has_value()) return wrong;
    const auto sizes = kernel->dimensions();
    const size_t rank = listen_taps(i) == 3 ? 3 : 2;
    if (sizes.size() != rank || (rank == 3 && sizes[0] != 3) || size_of(*bias) != sizes[rank - 1]) return wrong;
    call->layers[i] = {kernel->typed_data(), bias->typed_data(), sizes[rank - 2], sizes[rank - 1]};
  }
  return call->layers[0].in == dims[2] && can_listen(*call) ? ffi::Error::Success() : wrong;
}

// -> tokens [tokens, features], pooled [features]
ffi::Error listen_forward_cpu(F32 windows, ffi::RemainingArgs arrays, OutF32 tokens, OutF32 pooled) {
  Listen call;
  ffi::Error error = make_listen(windows, arrays, &call);
  if (error.failure()) return error;
  if (size_of(*tokens) != call.tokens * call.features() || size_of(*pooled) != call.features())
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "listen: operands have the wrong shapes");
  listen(call, tokens->typed_data(), pooled->typed_data());
  return ffi::Error::Success();
}

// cotangents of the results, then the same operands -> cotangents of the operands
ffi::Error listen_backward_cpu(F32 d_tokens, F32 d_pooled, F32 windows, ffi::RemainingArgs arrays, OutF32 d_windows,
                               ffi::RemainingRets results) {
  const ffi::Error wrong(ffi::ErrorCode::kInvalidArgument, "listen: operands have the wrong shapes");
  Listen call;
  ffi::Error error = make_listen(windows, arrays, &call);
  if (error.failure()) return error;
  if (size_of(d_tokens) != call.tokens * call.features() || size_of(d_pooled) != call.features() ||
      size_of(*d_windows) != size_of(windows) || results.size() != arrays.size())
    return wrong;
  ListenSlopes slopes[kListenLayers];
  for (int i = 0; i < kListenLayers; ++i) {
    auto kernel = results.get<F32>(2 * i), bias = results.get<F32>(2 * i + 1);
    const ListenLayer& layer = call.layers[i];
    if (!kernel.has_value() || !bias.has_value() || size_of(**kernel) != listen_taps(i) * layer.in * layer.out ||
        size_of(**bias) != layer.out)
      return wrong;
    slopes[i] = {(*kernel)->typed_data(), (*bias)->typed_data()};
  }
  listen_backward(call, d_tokens.typed_data(), d_pooled.typed_data(), d_windows->typed_data(), slopes);
  return ffi::Error::Success();
}

// The seven operands of attention.
template <class Binding>
auto bind_attend(Binding&& binding) {
  return std::move(binding).template Arg<F32>().template Arg<F32>().template Arg<F32>().template Arg<F32>()
      .template Arg<F32>().template Arg<F32>().template Arg<F32>();
}

// The six operands of a gated perceptron.
template <class Binding>
auto bind_gated(Binding&& binding) {
  return std::move(binding).template Arg<F32>().template Arg<F32>().template Arg<F32>().template Arg<F32>()
      .template Arg<F32>().template Arg<F32>();
}

XLA_FFI_DEFINE_HANDLER(kGridEncodeCpu, grid_encode_cpu,
                       bind_grid(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>()));
XLA_FFI_DEFINE_HANDLER(kGridBackwardTablesCpu, grid_backward_tables_cpu,
                       bind_grid(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>()));
XLA_FFI_DEFINE_HANDLER(kGridBackwardPositionsCpu, grid_backward_positions_cpu,
                       bind_grid(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>()));
XLA_FFI_DEFINE_HANDLER(kMlpForwardCpu, mlp_forward_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<
                           ffi::Span<const int32_t>>("sizes"));
XLA_FFI_DEFINE_HANDLER(kMlpBackwardCpu, mlp_backward_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>().Attr<
                           ffi::Span<const int32_t>>("sizes"));
XLA_FFI_DEFINE_HANDLER(kMlpOntoCpu, mlp_onto_cpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<
                           ffi::Span<const int32_t>>("sizes"));
XLA_FFI_DEFINE_HANDLER(kAttendForwardCpu, attend_forward_cpu,
                       bind_attend(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).Ret<F32>().Attr<int64_t>("heads"));
XLA_FFI_DEFINE_HANDLER(kAttendBackwardCpu, attend_backward_cpu,
                       bind_attend(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).Arg<F32>().Ret<F32>().Ret<F32>().Ret<F32>()
                           .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Attr<int64_t>("heads"));
XLA_FFI_DEFINE_HANDLER(kGatedForwardCpu, gated_forward_cpu,
                       bind_gated(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).Ret<F32>().Attr<ffi::Span<const int32_t>>(
                           "sizes").Attr<ffi::Span<const int32_t>>("counts"));
XLA_FFI_DEFINE_HANDLER(kGatedBackwardCpu, gated_backward_cpu,
                       bind_gated(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()).Arg<F32>().Ret<F32>().Ret<F32>().Ret<F32>()
                           .Ret<F32>().Ret<F32>().Ret<F32>().Attr<ffi::Span<const int32_t>>("sizes")
                           .Attr<ffi::Span<const int32_t>>("counts"));
XLA_FFI_DEFINE_HANDLER(kListenForwardCpu, listen_forward_cpu,
                       ffi::Ffi::Bind().Arg<F32>().RemainingArgs().Ret<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER(kListenBackwardCpu, listen_backward_cpu,
                       ffi::Ffi::Bind().Arg<F32>().Arg<F32>().Arg<F32>().RemainingArgs().Ret<F32>().RemainingRets());

}  // namespace

std::vector<Registration> network_registrations() {
  return {{"fg3dgs_grid_encode", "cpu", kGridEncodeCpu},
          {"fg3dgs_grid_backward_tables", "cpu", kGridBackwardTablesCpu},
          {"fg3dgs_grid_backward_positions", "cpu", kGridBackwardPositionsCpu},
          {"fg3dgs_mlp_forward", "cpu", kMlpForwardCpu},
          {"fg3dgs_mlp_backward", "cpu", kMlpBackwardCpu},
          {"fg3dgs_mlp_onto", "cpu", kMlpOntoCpu},
          {"fg3dgs_gated_forward", "cpu", kGatedForwardCpu},
          {"fg3dgs_gated_backward", "cpu", kGatedBackwardCpu},
          {"fg3dgs_attend_forward", "cpu", kAttendForwardCpu},
          {"fg3dgs_attend_backward", "cpu", kAttendBackwardCpu},
          {"fg3dgs_listen_forward", "cpu", kListenForwardCpu},
          {"fg3dgs_listen_backward", "cpu", kListenBackwardCpu}};
}

}  // namespace fg3dgs
