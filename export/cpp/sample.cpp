// Samples images from a tick that stepfusion exported with AOTInductor: LibTorch, no Python, no stepfusion.
//   stepfusion export MODEL --format aoti --kind tick --out DIR
//   sample DIR OUT.ppm [--num N] [--index FIRST] [--seed S] [--labels 0,1,...] [--guidance G]
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using at::Tensor;
using Texts = std::vector<std::string>;
using Json = std::map<std::string, Texts>;  // path -> its leaves in order: "model.shape" -> {"1", "28", "28"}

void require(bool condition, const std::string& sentence) {
  if (!condition) throw std::runtime_error(sentence);
}

std::string quoted(const char*& at) {  // as far as the bundle's own keys and values need it
  std::string text;
  for (++at; *at && *at != '"'; ++at) text += *at == '\\' && at[1] ? *++at : *at;
  require(*at++ == '"', "a text in the JSON has no end");
  return text;
}

void parse(const char*& at, const std::string& path, Json& into) {
  const auto skip = [&] { at += std::strspn(at, " \t\r\n,:"); };
  skip();
  if (*at == '{' || *at == '[') {
    const bool object = *at++ == '{';
    for (skip(); *at && *at != ']' && *at != '}'; skip())
      parse(at, object ? path + (path.empty() ? "" : ".") + quoted(at) : path, into);
    require(*at++ == (object ? '}' : ']'), "a list or an object in the JSON has no end");
  } else if (*at == '"') {
    into[path].push_back(quoted(at));
  } else {
    const size_t size = std::strcspn(at, " \t\r\n,]}");
    into[path].emplace_back(at, size);
    at += size;
  }
}

Json read_json(const std::string& path) {
  std::ifstream file(path);
  require(file.good(), path + " cannot be read");
  const std::string text(std::istreambuf_iterator<char>(file), {});
  Json json;
  const char* at = text.c_str();
  parse(at, "", json);
  return json;
}

const Texts& leaves(const Json& json, const std::string& path) {
  require(json.count(path) > 0, "the bundle has no " + path);
  return json.at(path);
}

template <typename Number>
Number number(const std::string& name, const std::string& text) {
  if (text == "null" && std::is_floating_point_v<Number>) return std::numeric_limits<Number>::infinity();  // no clip
  std::istringstream stream(text);
  Number value{};
  const bool read = stream >> value && stream.eof() && (std::is_signed_v<Number> || text[0] != '-');
  require(read, name + " must be a number" + (std::is_signed_v<Number> ? "" : " from 0 on") + ", got '" + text + "'");
  return value;
}

template <typename Number>
Tensor numbers(const std::string& name, const Texts& texts) {
  std::vector<Number> values;
  for (const auto& text : texts) values.push_back(number<Number>(name, text));
  return at::tensor(values, c10::CppTypeToScalarType<Number>::value);
}

void write_ppm(const Tensor& pixels, const std::string& path) {  // uint8 [N, H, W, 3], side by side in a square
  const int64_t num = pixels.size(0), height = pixels.size(1), width = pixels.size(2);
  const int64_t columns = std::ceil(std::sqrt(num)), rows = (num + columns - 1) / columns;
  const Tensor cells = at::cat({pixels, at::zeros({rows * columns - num, height, width, 3}, at::kByte)});
  const Tensor sheet = cells.view({rows, columns, height, width, 3}).transpose(1, 2).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << columns * width << " " << rows * height << "\n255\n";
  file.write(static_cast<const char*>(sheet.data_ptr()), sheet.numel());
  require(file.flush().good(), path + " cannot be written");
}

void run(const Texts& arguments) {
  require(arguments.size() >= 2 && arguments.size() % 2 == 0, "usage: sample DIR OUT.ppm [--OPTION VALUE]...");
  const std::string& folder = arguments[0];
  const Json manifest = read_json(folder + "/manifest.json"), table = read_json(folder + "/table.json");
  const auto fact = [&](const std::string& path) { return leaves(manifest, path)[0]; };
  require(fact("version") == "stepfusion bundle 2" && fact("format") == "aoti" && fact("kind") == "tick",
          folder + " holds a " + fact("kind") + " as " + fact("format") + "; this program runs a tick as aoti");
  require(fact("versions.torch").find(std::string(TORCH_VERSION).substr(0, std::strcspn(TORCH_VERSION, "+"))) == 0,
          folder + " was made for torch " + fact("versions.torch") + ", and LibTorch here is " + TORCH_VERSION);
  const Texts& sizes = leaves(manifest, "model.batch");  // smallest, usual, largest
  std::map<std::string, std::string> given = {{"--num", sizes[1]}, {"--index", "0"}, {"--seed", "0"}};
  for (const auto& input : leaves(manifest, "inputs.name"))
    if (input == "labels" || input == "guidance")
      given["--" + input] = input == "labels" ? fact("model.null_label") : "1";
  for (size_t i = 2; i < arguments.size(); i += 2) {
    require(given.count(arguments[i]) > 0, "this tick has no option " + arguments[i]);
    given[arguments[i]] = arguments[i + 1];
  }
  const c10::InferenceMode inference;
  const c10::Device device(fact("device"));
  const auto num = number<uint32_t>("--num", given["--num"]), first = number<uint32_t>("--index", given["--index"]);
  require(num >= std::stoll(sizes[0]) && num <= std::stoll(sizes[2]),
          "--num must be from " + sizes[0] + " to " + sizes[2] + ", the bundle's batch, got " + given["--num"]);
  const Tensor images = at::arange(num, at::kLong), index = (images + int64_t{first}).to(device);
  const Tensor seed = at::full_like(index, static_cast<int64_t>(number<uint64_t>("--seed", given["--seed"])));
  std::vector<Tensor> lanes = {seed, index};
  if (given.count("--labels")) {
    Texts list;
    for (std::stringstream text(given["--labels"]); text.good();) std::getline(text, list.emplace_back(), ',');
    const Tensor labels = numbers<int64_t>("--labels", list);
    require(((labels >= 0) & (labels < std::stoll(fact("model.num_classes")))).all().item<bool>(),
            "--labels must be from 0 to below " + fact("model.num_classes") + ", got " + given["--labels"]);
    lanes.push_back(labels.index_select(0, images % labels.numel()).to(device));
  }
  if (given.count("--guidance"))
    lanes.push_back(at::full({num}, number<float>("--guidance", given["--guidance"]), at::kFloat).to(device));
  torch::inductor::AOTIModelPackageLoader tick(folder + "/model.pt2"), initial_noise(folder + "/initial_noise.pt2");
  const Tensor timesteps = numbers<int64_t>("timesteps", leaves(table, "timesteps")).to(device);
  const Tensor next_row = numbers<int64_t>("next_row", leaves(table, "next_row"));
  const Tensor rows = numbers<double>("coefficients", leaves(table, "coefficients")).to(device, at::kFloat);
  Tensor x = initial_noise.run({seed, index})[0];
  for (int64_t row = 0; row >= 0; row = next_row[row].item<int64_t>()) {
    std::vector<Tensor> inputs = {x, at::full_like(index, row), rows.view({timesteps.numel(), -1}), timesteps};
    inputs.insert(inputs.end(), lanes.begin(), lanes.end());
    x = tick.run(inputs)[0];
  }
  const Tensor level = (x.cpu() * 0.5 + 0.5).nan_to_num(0.0).clamp(0.0, 1.0) * 255.0;
  const Tensor pixels = level.round().to(at::kByte).permute({0, 2, 3, 1});  // halves to even
  require(x.size(1) == 1 || x.size(1) == 3, "a PPM has 1 or 3 channels, and the images have " + fact("model.shape"));
  write_ppm(pixels.expand({-1, -1, -1, 3}), arguments[1]);
}

int main(int argc, char** argv) try {
  run(Texts(argv + 1, argv + argc));
} catch (const std::exception& error) {
  std::cerr << "sample: " << std::string(error.what()).substr(0, std::strcspn(error.what(), "\n")) << "\n";
  return 1;
}
