// The class `Decoder` of the library `vision_scan_cpu`: a language model whose decoding step is one call. It holds
// the model's own tensors and looks at them anew in each step, so weights may be trained, moved or replaced in place
// between steps. cobra/lm/decode.py builds it.
#include "ops.h"

#include <torch/custom_class.h>

namespace vision_scan {
namespace {

using Tensors = std::vector<Tensor>;

// float32 or bfloat16.
Numbers numbers(const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  const bool half = tensor.scalar_type() == at::kBFloat16;
  check(name, tensor, shape, half ? at::kBFloat16 : at::kFloat);
  return {tensor.data_ptr(), half};
}

const float* floats(const char* name, const Tensor& tensor, at::IntArrayRef shape) {
  check(name, tensor, shape);
  return tensor.const_data_ptr<float>();
}

// A projection given as its weight (out, in), or as packed codes and their scales.
Weights weights(const char* name, const Tensors& given, int64_t out, int64_t in) {
  if (given.size() == 1) {
    const Numbers plain = numbers(name, given[0], {out, in});
    return {plain.half ? Format::bfloat16 : Format::float32, out, in, 0, plain.data, nullptr};
  }
  TORCH_CHECK_VALUE(given.size() == 2, name, " must be a weight, or codes and scales, got ", given.size(), " tensors");
  const Tensor &codes = given[0], &scales = given[1];
  TORCH_CHECK_VALUE(scales.dim() == 3 && scales.size(1) > 0, name, ": scales must have 3 axes and a group, got ",
                    scales.sizes());
  const int64_t blocks = (out + kPackedRows - 1) / kPackedRows, groups = scales.size(1);
  const bool wide = codes.scalar_type() == at::kChar;
  TORCH_CHECK_VALUE(codes.dim() == 4, name, ": codes must have 4 axes, got ", codes.dim());
  const int64_t padded_in = wide ? codes.size(1) * 4 : codes.size(1) * 32, group = padded_in / groups;
  check(name, scales, {blocks, groups, kPackedRows}, at::kBFloat16);
  if (wide)
    check(name, codes, {blocks, padded_in / 4, kPackedRows, 4}, at::kChar);
  else
    check(name, codes, {blocks, padded_in / 32, 4, 32}, at::kByte);
  TORCH_CHECK_VALUE(group % 32 == 0 && group * groups == padded_in && (in + group - 1) / group == groups, name,
                    ": groups must have a multiple of 32 columns and cover ", in, ", got ", groups, " over ", padded_in);
  return {wide ? Format::int8 : Format::int4, out, in, group, codes.const_data_ptr(),
          static_cast<const uint16_t*>(scales.const_data_ptr())};
}

// One layer's tensors and sizes, in the order in which its `add_` method names them.
struct Entry {
  Layer::Kind kind;
  Tensor norm;
  double eps;
  std::vector<Tensors> projections;
  Tensors parameters;
  std::vector<int64_t> sizes;
  std::vector<double> constants;

  int64_t num_states() const {
    return kind == Layer::mlp ? 0 : kind == Layer::attention ? 3 : 2;
  }
};

// The convolution of a Mamba layer, whose parameters come first in an entry, and its state.
template <typename SomeLayer>
void bind_convolution(SomeLayer& l, const Entry& e, int64_t channels, int64_t batch, const Tensor& state) {
  l.conv_weight = numbers("conv1d.weight", e.parameters[0], {channels, 1, l.d_conv});
  l.conv_bias = numbers("conv1d.bias", e.parameters[1], {channels});
  l.conv = numbers("state conv", state, {batch, channels, l.d_conv - 1});
  TORCH_CHECK_VALUE(l.conv.half == l.conv_weight.half && l.conv.half == l.conv_bias.half,
                    "the convolution's state, weight and bias must have one dtype");
}

Mamba2Layer as_mamba2(const Entry& e, int64_t d_model, int64_t batch, const Tensor* state) {
  Mamba2Layer l{};
  l.nheads = e.sizes[0], l.headdim = e.sizes[1], l.ngroups = e.sizes[2], l.d_state = e.sizes[3], l.d_conv = e.sizes[4];
  TORCH_CHECK_VALUE(l.nheads % l.ngroups == 0, "nheads ", l.nheads, " must be a multiple of ngroups ", l.ngroups);
  const int64_t d_inner = l.nheads * l.headdim, channels = d_inner + 2 * l.ngroups * l.d_state;
  l.in_proj = weights("in_proj", e.projections[0], d_inner + channels + l.nheads, d_model);
  l.out_proj = weights("out_proj", e.projections[1], d_model, d_inner);
  bind_convolution(l, e, channels, batch, state[0]);
  l.dt_bias = floats("dt_bias", e.parameters[2], {l.nheads});
  l.A_log = floats("A_log", e.parameters[3], {l.nheads});
  l.D = floats("D", e.parameters[4], {l.nheads});
  l.norm = floats("norm.weight", e.parameters[5], {d_inner});
  l.eps = static_cast<float>(e.constants[0]);
  l.dt_min = static_cast<float>(e.constants[1]);
  l.dt_max = static_cast<float>(e.constants[2]);
  l.norm_before_gate = e.constants[3] != 0;
  check("state ssm", state[1], {batch, l.nheads, l.headdim, l.d_state});
  l.ssm = state[1].data_ptr<float>();
  return l;
}

Mamba1Layer as_mamba1(const Entry& e, int64_t d_model, int64_t batch, const Tensor* state) {
  Mamba1Layer l{};
  l.d_inner = e.sizes[0], l.d_state = e.sizes[1], l.dt_rank = e.sizes[2], l.d_conv = e.sizes[3];
  l.in_proj = weights("in_proj", e.projections[0], 2 * l.d_inner, d_model);
  l.x_proj = weights("x_proj", e.projections[1], l.dt_rank + 2 * l.d_state, l.d_inner);
  l.dt_proj = weights("dt_proj", e.projections[2], l.d_inner, l.dt_rank);
  l.out_proj = weights("out_proj", e.projections[3], d_model, l.d_inner);
  bind_convolution(l, e, l.d_inner, batch, state[0]);
  l.dt_bias = floats("dt_proj.bias", e.parameters[2], {l.d_inner});
  l.A_log = floats("A_log", e.parameters[3], {l.d_inner, l.d_state});
  l.D = floats("D", e.parameters[4], {l.d_inner});
  check("state ssm", state[1], {batch, l.d_inner, l.d_state});
  l.ssm = state[1].data_ptr<float>();
  return l;
}

AttentionLayer as_attention(const Entry& e, int64_t d_model, int64_t batch, const Tensor* state) {
  AttentionLayer l{};
  l.num_heads = e.sizes[0], l.num_kv_heads = e.sizes[1], l.headdim = e.sizes[2];
  TORCH_CHECK_VALUE(l.num_heads % l.num_kv_heads == 0, "num_heads ", l.num_heads,
                    " must be a multiple of num_kv_heads ", l.num_kv_heads);
  const int64_t queries = l.num_heads * l.headdim, keys = l.num_kv_heads * l.headdim;
  l.q_proj = weights("q_proj", e.projections[0], queries, d_model);
  l.k_proj = weights("k_proj", e.projections[1], keys, d_model);
  l.v_proj = weights("v_proj", e.projections[2], keys, d_model);
  l.o_proj = weights("o_proj", e.projections[3], d_model, queries);
  l.rope_theta = static_cast<float>(e.constants[0]);
  TORCH_CHECK_VALUE(state[0].dim() == 4, "state k must have 4 axes, got ", state[0].dim());
  l.slots = state[0].size(2);
  TORCH_CHECK_VALUE(l.slots > 0, "state k must have room for a token, got ", state[0].sizes());
  l.k = numbers("state k", state[0], {batch, l.num_kv_heads, l.slots, l.headdim});
  l.v = numbers("state v", state[1], {batch, l.num_kv_heads, l.slots, l.headdim});
  check("state position", state[2], {batch, l.slots}, at::kLong);
  l.position = state[2].data_ptr<int64_t>();
  TORCH_CHECK_VALUE(l.k.half == l.v.half, "keys and values must have one dtype");
  return l;
}

MlpLayer as_mlp(const Entry& e, int64_t d_model) {
  const int64_t d_ff = e.sizes[0];
  return {weights("gate_proj", e.projections[0], d_ff, d_model), weights("up_proj", e.projections[1], d_ff, d_model),
          weights("down_proj", e.projections[2], d_model, d_ff)};
}

class Decoder : public torch::CustomClassHolder {
 public:
  // What stands behind the layers: the last norm and the head of `vocab` rows.
  Decoder(Tensor norm, double eps, Tensors head, int64_t vocab)
      : norm_(std::move(norm)), eps_(eps), head_(std::move(head)), vocab_(vocab) {}

  void add_mamba2(Tensor norm, double eps, Tensors in_proj, Tensors out_proj, Tensors parameters,
                  std::vector<int64_t> sizes, std::vector<double> constants) {
    add(Layer::mamba2, norm, eps, {in_proj, out_proj}, parameters, 6, sizes, 5, constants, 4);
  }

  void add_mamba1(Tensor norm, double eps, Tensors in_proj, Tensors x_proj, Tensors dt_proj, Tensors out_proj,
                  Tensors parameters, std::vector<int64_t> sizes) {
    add(Layer::mamba1, norm, eps, {in_proj, x_proj, dt_proj, out_proj}, parameters, 5, sizes, 4, {}, 0);
  }

  void add_attention(Tensor norm, double eps, Tensors q_proj, Tensors k_proj, Tensors v_proj, Tensors o_proj,
                     std::vector<int64_t> sizes, double rope_theta) {
    add(Layer::attention, norm, eps, {q_proj, k_proj, v_proj, o_proj}, {}, 0, sizes, 3, {rope_theta}, 1);
  }

  void add_mlp(Tensor norm, double eps, Tensors gate_proj, Tensors up_proj, Tensors down_proj, int64_t d_ff) {
    add(Layer::mlp, norm, eps, {gate_proj, up_proj, down_proj}, {}, 0, {d_ff}, 1, {}, 0);
  }

  // hidden (batch, seqlen, d_model) float32 is overwritten, the states, those of all layers one after another, are
  // updated in place; starts (batch) int64, real (batch) bool or none. Returns logits (batch, keep, vocab).
  Tensor step(Tensor hidden, Tensors states, Tensor starts, OptionalTensor real, int64_t keep) {
    TORCH_CHECK_VALUE(hidden.dim() == 3, "hidden must have 3 axes, got ", hidden.dim());
    Decode s{};
    s.batch = hidden.size(0), s.seqlen = hidden.size(1), s.d_model = hidden.size(2);
    check("hidden", hidden, {s.batch, s.seqlen, s.d_model});
    check("starts", starts, {s.batch}, at::kLong);
    TORCH_CHECK_VALUE(s.batch > 0 && starts.min().item<int64_t>() >= 0, "starts must be 0 or more, got ", starts);
    if (real) check("real", *real, {s.batch}, at::kBool);
    TORCH_CHECK_VALUE(1 <= keep && keep <= s.seqlen, "keep must be from 1 to seqlen ", s.seqlen, ", got ", keep);
    s.starts = starts.const_data_ptr<int64_t>();
    s.real = real ? real->const_data_ptr<bool>() : nullptr;
    const std::vector<Layer> layers = bind(states, s);
    s.layers = layers.data();
    s.num_layers = static_cast<int64_t>(layers.size());
    s.norm = floats("norm_f.weight", norm_, {s.d_model});
    s.eps = static_cast<float>(eps_);
    s.head = weights("lm_head", head_, vocab_, s.d_model);
    s.keep = keep;
    const Tensor shared = at::empty({s.shared_floats()}, hidden.options());
    Tensor logits = at::empty({s.batch, keep, vocab_}, hidden.options());
    s.hidden = hidden.data_ptr<float>();
    s.shared = shared.data_ptr<float>();
    s.logits = logits.data_ptr<float>();
    kernels()->decode(s);
    return logits;
  }

 private:
  void add(Layer::Kind kind, Tensor norm, double eps, std::vector<Tensors> projections, Tensors parameters,
           size_t num_parameters, std::vector<int64_t> sizes, size_t num_sizes, std::vector<double> constants,
           size_t num_constants) {
    TORCH_CHECK_VALUE(parameters.size() == num_parameters, "expected ", num_parameters, " parameters, got ",
                      parameters.size());
    TORCH_CHECK_VALUE(sizes.size() == num_sizes, "expected ", num_sizes, " sizes, got ", sizes.size());
    for (const int64_t size : sizes) TORCH_CHECK_VALUE(size > 0, "sizes must be above 0, got ", sizes);
    TORCH_CHECK_VALUE(constants.size() == num_constants, "expected ", num_constants, " constants, got ",
                      constants.size());
    entries_.push_back({kind, norm, eps, projections, parameters, sizes, constants});
  }

  std::vector<Layer> bind(const Tensors& states, const Decode& s) const {
    std::vector<Layer> layers;
    layers.reserve(entries_.size());
    size_t used = 0;
    for (const Entry& e : entries_) {
      TORCH_CHECK_VALUE(used + e.num_states() <= states.size(), "got only ", states.size(), " states");
      const Tensor* state = states.data() + used;
      used += e.num_states();
      Layer layer{e.kind, floats("norm.weight", e.norm, {s.d_model}), static_cast<float>(e.eps), {}, {}, {}, {}};
      switch (e.kind) {
        case Layer::mamba2:
          layer.as_mamba2 = as_mamba2(e, s.d_model, s.batch, state);
          break;
        case Layer::mamba1:
          layer.as_mamba1 = as_mamba1(e, s.d_model, s.batch, state);
          break;
        case Layer::attention:
          TORCH_CHECK_VALUE(s.seqlen == 1, "attention decodes one token at a time, got ", s.seqlen);
          layer.as_attention = as_attention(e, s.d_model, s.batch, state);
          break;
        case Layer::mlp:
          layer.as_mlp = as_mlp(e, s.d_model);
          break;
      }
      layers.push_back(layer);
    }
    TORCH_CHECK_VALUE(used == states.size(), "expected ", used, " states, got ", states.size());
    return layers;
  }

  Tensor norm_;
  double eps_;
  Tensors head_;
  int64_t vocab_;
  std::vector<Entry> entries_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(vision_scan_cpu, m) {
  m.class_<Decoder>("Decoder")
      .def(torch::init<Tensor, double, Tensors, int64_t>())
      .def("add_mamba2", &Decoder::add_mamba2)
      .def("add_mamba1", &Decoder::add_mamba1)
      .def("add_attention", &Decoder::add_attention)
      .def("add_mlp", &Decoder::add_mlp)
      .def("step", &Decoder::step);
}

}  // namespace vision_scan
