#include "../launch/network.h"

#include <charconv>

#include "conv_judge.h"

namespace resnet_fused::driver {
namespace {

// The float64 reference of more products takes longer than the check may.
constexpr int64_t kMostProducts = 300'000'000;
constexpr int kImage = 0;  // the tensor that the network reads; layer i makes tensor i + 1

struct Layer {
  Convolution of;
  int source;    // the tensor that it reads
  int residual;  // that it adds; -1: none
  bool relu;

  int64_t products() const { return elements_of(of.out_size()) * of.c * of.r * of.s; }
};

std::vector<int64_t> depths_of(const Arguments& arguments) {
  const std::string& text = arguments.text("depths");
  std::vector<int64_t> depths;
  const char* at = text.data();
  const char* end = at + text.size();
  while (true) {
    int64_t depth = 0;
    const auto [stop, error] = std::from_chars(at, end, depth);
    const bool goes_on = stop != end && *stop == ',';
    if (error != std::errc() || depth < 1 || depth > 1000 || (stop != end && !goes_on)) {
      throw UsageError("--depths is '" + text +
                       "'; numbers from 1 to 1000 are accepted, as 3,4,6,3");
    }
    depths.push_back(depth);
    if (!goes_on) return depths;
    at = stop + 1;
  }
}

// Bottlenecks as torchvision's ResNets have them: the 3x3 has the stride, and the first block of a
// stage a projection.
class Layers {
 public:
  explicit Layers(const Arguments& arguments) : shape_(arguments) {
    shape_.groups = shape_.dilation = 1;
    channels_ = {shape_.c};
    sides_ = {{shape_.h, shape_.w}};
    int last = kImage;
    int64_t width = shape_.k;
    int64_t stride = 1;
    for (const int64_t depth : depths_of(arguments)) {
      for (int64_t block = 0; block < depth; ++block) {
        last = bottleneck(last, width, stride, block == 0);
        stride = 1;
      }
      width *= 2;
      stride = 2;
    }
  }
  const std::vector<Layer>& list() const { return list_; }

 private:
  int bottleneck(int x, int64_t width, int64_t stride, bool projects) {
    const int shortcut = projects ? add({x, -1, false}, 4 * width, 1, stride) : x;
    const int inner = add({x, -1, true}, width, 1, 1);
    const int outer = add({inner, -1, true}, width, 3, stride);
    return add({outer, shortcut, true}, 4 * width, 1, 1);
  }

  struct Place {
    int source;
    int residual;
    bool relu;
  };
  // The tensor that the new layer makes.
  int add(const Place& at, int64_t k, int64_t taps, int64_t stride) {
    Convolution of = shape_;
    of.c = channels_[at.source];
    of.h = sides_[at.source][0];
    of.w = sides_[at.source][1];
    of.k = k;
    of.r = of.s = taps;
    of.stride = stride;
    of.padding = taps / 2;
    list_.push_back({of, at.source, at.residual, at.relu});
    channels_.push_back(k);
    sides_.push_back({of.p(), of.q()});
    return static_cast<int>(list_.size());
  }

  Convolution shape_;
  std::vector<int64_t> channels_;  // of each tensor
  std::vector<std::array<int64_t, 2>> sides_;
  std::vector<Layer> list_;
};

template <class T>
struct Parameters {
  Operand<T> weight;
  Operand<float> scale;
  Operand<float> shift;

  // Scales keep the activations near 1, however deep the network is.
  Parameters(const Convolution& of, Common& common)
      : weight(elements_of(of.weight_size()), common.random, common.values),
        scale(of.k, common.random, common.values),
        shift(of.k, common.random, common.values) {
    const double spread = common.values == Values::kIntegers ? 20.0 / 3 : 1;  // of a value, squared
    const double sum = std::sqrt(static_cast<double>(of.c * of.r * of.s) * spread);
    for (float& one : scale.host) one = static_cast<float>(one / (sum * std::sqrt(spread)));
    for (float& one : shift.host) one = static_cast<float>(one / (4 * std::sqrt(spread)));
    scale.device.copy_from(scale.host.data());
    shift.device.copy_from(shift.host.data());
  }
};

// A layer as a kernel of its own.
class Single {
 public:
  // configuration, splits: -1 and 0 leave them to conv_bn_act's plan.
  Single(const RfConvBnAct& problem, const RfGpu& gpu, int32_t configuration, int32_t splits)
      : problem_(problem) {
    char why[512] = "";
    if (rf_conv_bn_act_plan(&problem_, &gpu, configuration, splits, &plan_, why, sizeof why) != 0) {
      throw std::runtime_error(std::string("no plan of a layer alone: ") + why);
    }
    workspace_ = Buffer(static_cast<size_t>(plan_.workspace_bytes));
  }

  // Before the one ahead has ended, as the frozen engine launches it.
  void begin_early(bool follows) {
    constexpr int64_t kCounters = 4096;
    counters_ = Buffer(kCounters * 4);
    counters_.copy_from(std::vector<uint32_t>(kCounters).data());
    problem_.arrivals = static_cast<uint32_t*>(counters_.data());
    problem_.arrivals_count = kCounters;
    problem_.flow = {1, static_cast<int32_t>(follows)};
  }

  void launch(void* stream) const {
    check(rf_conv_bn_act_cuda(&problem_, &plan_, workspace_.data(), stream), "conv_bn_act");
  }

 private:
  RfConvBnAct problem_;
  RfConvPlan plan_;
  Buffer workspace_{0};
  Buffer counters_{0};
};

int32_t number_of(const Arguments& arguments, const char* name) {
  return static_cast<int32_t>(
      std::min<int64_t>(arguments.integer(name, 0), std::numeric_limits<int32_t>::max()));
}

// In clusters no more blocks than this very GPU's GPCs have room for.
RfNetworkPlan planned(const RfNetwork& network, const RfGpu& gpu, int32_t blocks, Json& json) {
  RfNetworkPlan plan;
  char why[512] = "";
  const auto make = [&] {
    if (rf_network_plan(&network, &gpu, blocks, &plan, why, sizeof why) != 0) {
      throw UsageError(std::string("no plan: ") + why);
    }
  };
  make();
#if !defined(RF_EMULATED) && defined(RF_WITH_SM90A)
  if (plan.cluster > 1) {
    int32_t clusters = 0;
    check(rf_network_clusters(plan.cluster, &clusters), "clusters at once");
    json.add("clusters_at_once", static_cast<int64_t>(clusters));
    if (clusters > 0 && clusters * plan.cluster < plan.blocks) {
      blocks = clusters * plan.cluster;
      make();
    }
  }
#endif
  json.add("plan", why);
  return plan;
}

template <class T>
class Network {
 public:
  Network(const std::vector<Layer>& layers, Common& common)
      : layers_(layers),
        common_(common),
        image_(elements_of(layers[0].of.x_size()), common.random, common.values) {
    for (const Layer& layer : layers) parameters_.emplace_back(layer.of, common);
    together_ = Run(*this);
    single_ = Run(*this);
  }

  bool run(const Arguments& arguments, Json& json) {
    const RfGpu gpu = this_gpu();
    const std::vector<int32_t> splits(layers_.size(), number_of(arguments, "splits"));
    const std::vector<int32_t> pixels(layers_.size(), number_of(arguments, "pixels"));
    const RfNetwork network{together_.problems.data(), static_cast<int32_t>(layers_.size()),
                            splits.data(), pixels.data(), number_of(arguments, "cluster")};
    const RfNetworkPlan plan = planned(network, gpu, number_of(arguments, "blocks"), json);
    Buffer workspace(static_cast<size_t>(plan.workspace_bytes));
    // NaN, but for the counters.
    std::vector<uint8_t> state(static_cast<size_t>(plan.workspace_bytes), 0xFF);
    std::fill_n(state.begin(), plan.counter_bytes, uint8_t{0});
    workspace.copy_from(state.data());
    const auto launch = [&] {
      check(rf_network_cuda(&network, &plan, workspace.data(), nullptr), "network");
    };
    launch();
    launch();  // with the workspace as it was left
    workspace.copy_to(state.data());
    const bool zeros = std::all_of(state.begin(), state.begin() + plan.counter_bytes,
                                   [](uint8_t byte) { return byte == 0; });
    json.add("counters_are_zeros", zeros);
    for (size_t i = 0; i < layers_.size(); ++i) {
      RfNetworkLayer of;
      rf_network_layer(&network, &plan, static_cast<int32_t>(i), &of);
      Single(single_.problems[i], gpu, rf_network_configuration(), of.splits).launch(nullptr);
    }
    const bool right = judged(json) && zeros;
    time(gpu, launch, json);
    return right;
  }

 private:
  // One set of activations, and the problems that make them.
  struct Run {
    std::vector<Operand<T>> made;
    std::vector<RfConvBnAct> problems;

    Run() = default;
    explicit Run(const Network& network) {
      for (const Layer& layer : network.layers_)
        made.emplace_back(elements_of(layer.of.out_size()));
      for (size_t i = 0; i < network.layers_.size(); ++i) {
        problems.push_back(network.problem(i, *this));
      }
    }
    const Operand<T>& tensor(const Network& network, int index) const {
      return index == kImage ? network.image_ : made[static_cast<size_t>(index - 1)];
    }
  };

  RfConvBnAct problem(size_t i, const Run& run) const {
    const Layer& layer = layers_[i];
    const Parameters<T>& parameters = parameters_[i];
    auto problem = problem_of<RfConvBnAct>(layer.of, common_);
    problem.x = run.tensor(*this, layer.source).device.data();
    problem.weight = parameters.weight.device.data();
    if (layer.residual >= 0) problem.residual = run.tensor(*this, layer.residual).device.data();
    problem.out = run.made[i].device.data();
    problem.scale = parameters.scale.device.data();
    problem.shift = parameters.shift.device.data();
    problem.relu = layer.relu;
    copy_to(problem.residual_stride, layer.of.out_at().stride);
    copy_to(problem.out_stride, layer.of.out_at().stride);
    return problem;
  }

  bool judged(Json& json) {
    for (Operand<T>& one : together_.made) one.fetch();
    for (Operand<T>& one : single_.made) one.fetch();
    int64_t products = 0;
    for (const Layer& layer : layers_) products += layer.products();
    const bool reference = products <= kMostProducts;
    int64_t differing = 0;
    Verdict verdict;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& layer = layers_[i];
      const Operand<T>& out = together_.made[i];
      for (int64_t place = 0; place < elements_of(layer.of.out_size()); ++place) {
        const double y = out.at(place);  // a NaN, as all were filled, differs
        differing += !(y == single_.made[i].at(place));
        if (!reference) ++verdict.elements;
      }
      if (!reference) continue;
      const Parameters<T>& parameters = parameters_[i];
      judge<T, T>(layer.of, common_,
                  {together_.tensor(*this, layer.source), parameters.weight,
                   layer.residual < 0 ? nullptr : &together_.tensor(*this, layer.residual),
                   parameters.scale, parameters.shift, layer.relu},
                  out, Values::kNormals, verdict);
    }
    json.add("layers", static_cast<int64_t>(layers_.size()));
    json.add("reference", reference);
    json.add("differing", differing);
    return report(verdict, json) && differing == 0;
  }

  // The launch with a cold and a warm L2 cache; then a graph of the layers one by one, each as
  // conv_bn_act's plan has it and the frozen engine launches it.
  template <class Launch>
  void time(const RfGpu& gpu, const Launch& launch, Json& json) {
    const int repeats = common_.repeats;
    report_times(time_calls(repeats, launch), json);
    report_median("warm_milliseconds", time_calls(repeats, launch, true), json);
    if (repeats == 0) return;
    std::vector<Single> alone;
    for (const RfConvBnAct& problem : single_.problems) {
      alone.emplace_back(problem, gpu, -1, 0);
      if (can_begin_early()) alone.back().begin_early(alone.size() > 1);
    }
    const auto all = [&](void* stream) {
      for (const Single& one : alone) one.launch(stream);
    };
    report_median("graph_milliseconds", time_graph(repeats, all, false), json);
    report_median("warm_graph_milliseconds", time_graph(repeats, all, true), json);
  }

  const std::vector<Layer>& layers_;
  Common& common_;
  Operand<T> image_;
  std::vector<Parameters<T>> parameters_;
  Run together_, single_;  // by one launch, and by one a layer
};

}  // namespace

bool run_network(const Arguments& arguments, Common& common, Json& json) {
  const Layers layers(arguments);
  return with_conv_type("network", common.dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 4) {
      throw UsageError("--dtype is 'float32'; network serves float16 and bfloat16");
      return false;
    } else {
      return Network<T>(layers.list(), common).run(arguments, json);
    }
  });
}

}  // namespace resnet_fused::driver
