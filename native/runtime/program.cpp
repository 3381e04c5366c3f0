#include "program.hpp"

#include <set>

#include "error.hpp"
#include "op.hpp"

namespace subbyte::runtime {
namespace {

using Kind = Json::Kind;

constexpr std::size_t kNodes = 100000;
constexpr int kDepth = 6;

Input input_of(const Json& json) {
  Input input{
      json.at("name", Kind::kText).text, {}, dtype_named(json.at("dtype", Kind::kText).text)};
  for (const Json& size : json.at("shape", Kind::kList).items) {
    if (!size.is(Kind::kNull) && (!size.is(Kind::kInteger) || size.integer < 0))
      throw Error("input '" + shown(input.name) + "' has a size that is none");
    input.shape.push_back(size.is(Kind::kNull) ? -1 : size.integer);
  }
  if (input.shape.size() > 16) throw Error("input '" + shown(input.name) + "' has too many sizes");
  return input;
}

void check_argument(const Json& json, const std::set<std::string>& known, int depth) {
  if (depth > kDepth) throw Error("the program has lists in lists in lists");
  if (json.is(Kind::kList))
    for (const Json& item : json.items) check_argument(item, known, depth + 1);
  if (!json.is(Kind::kMap)) return;
  if (json.items.size() != 1) throw Error("the program has an argument of several kinds");
  const std::string& kind = json.keys[0];
  const Json& content = json.items[0];
  if (kind == "map" && content.is(Kind::kMap)) {
    for (const Json& item : content.items) check_argument(item, known, depth + 1);
    return;
  }
  if (!content.is(Kind::kText)) throw Error("the program has a malformed argument");
  if (kind == "value" && !known.count(content.text))
    throw Error("the program uses '" + shown(content.text) + "' before it is made");
}

// Scales whose inverse, and whose products with any byte, are normal numbers.
ByteScale byte_scale(const Json& json, const std::string& name) {
  constexpr double kLeast = 0x1p-100, kMost = 0x1p100;
  const Json* scale = json.find("scale");
  const Json* sign = json.find("signed");
  if (!scale || !(scale->is(Kind::kReal) || scale->is(Kind::kInteger)) ||
      !(scale->real >= kLeast && scale->real <= kMost) || !sign || !sign->is(Kind::kBool))
    throw Error("the program has a malformed scale of '" + shown(name) + "'");
  return {static_cast<float>(scale->real), static_cast<std::uint8_t>(sign->integer ? 128 : 0)};
}

}  // namespace

Program read_program(const Json& manifest) {
  const Json* json = manifest.find("program");
  if (!json || !json->is(Kind::kMap))
    throw Error("the file has no program; save it with an example of its input");
  Program program;
  std::set<std::string> known;
  const auto name = [&](const std::string& own) {
    if (own.empty() || own.size() > 100 || !known.insert(own).second)
      throw Error("the program makes '" + shown(own) + "' twice, or without a name");
  };
  for (const Json& input : json->at("inputs", Kind::kList).items) {
    program.inputs.push_back(input_of(input));
    name(program.inputs.back().name);
  }
  const Json& layers = json->at("layers", Kind::kMap);
  for (std::size_t i = 0; i < layers.keys.size(); ++i) {
    if (!layers.items[i].is(Kind::kMap)) throw Error("a layer of the program is malformed");
    program.layers.emplace(layers.keys[i], &layers.items[i]);
  }
  const std::vector<Json>& nodes = json->at("nodes", Kind::kList).items;
  if (nodes.size() > kNodes) throw Error("the program has too many operations");
  for (const Json& own : nodes) {
    Node node{own.at("op", Kind::kText).text, own.at("out", Kind::kText).text, "",
              &own.at("args", Kind::kMap)};
    if (const Json* layer = own.find("layer")) node.layer = layer->text;
    if (!operator_named(node.op))
      throw Error("the runtime has no operator '" + shown(node.op) + "'");
    if (node.op == "Layer" && !program.layers.count(node.layer))
      throw Error("the program calls layer '" + shown(node.layer) + "', which it has not");
    for (const Json& item : node.args->items) check_argument(item, known, 0);
    name(node.out);
    program.nodes.push_back(node);
  }
  program.output = json->find("output");
  if (!program.output) throw Error("the program has no output");
  check_argument(*program.output, known, 0);
  if (!json->find("activations")) return program;
  const Json& activations = json->at("activations", Kind::kMap);
  for (std::size_t i = 0; i < activations.keys.size(); ++i) {
    const std::string& own = activations.keys[i];
    if (!known.count(own)) throw Error("the program has a scale of '" + shown(own) + "', no value");
    program.activations.emplace(own, byte_scale(activations.items[i], own));
  }
  return program;
}

}  // namespace subbyte::runtime
