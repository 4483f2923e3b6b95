#include <charconv>

#include "arguments.h"

namespace resnet_fused::driver {

void Arguments::parse(int count, const char* const* words) {
  for (int i = 0; i < count; ++i) {
    const std::string word = words[i];
    const size_t equals = word.find('=');
    const std::string name = word.starts_with("--") ? word.substr(2, equals - 2) : "";
    if (name.empty()) throw UsageError("'" + word + "' is no option; give --name value");
    Option& option = const_cast<Option&>(find(name));
    if (option.is_flag) {
      if (equals != std::string::npos) throw UsageError("--" + name + " takes no value");
      option.value = "1";
    } else if (equals != std::string::npos) {
      option.value = word.substr(equals + 1);
    } else if (i + 1 < count) {
      option.value = words[++i];
    } else {
      throw UsageError("--" + name + " needs a value: " + option.help);
    }
  }
}

std::string Arguments::help() const {
  constexpr size_t kColumn = 18;
  std::string lines;
  for (const Option& option : options_) {
    std::string line = std::string("  --") + option.name;
    line.append(line.size() < kColumn ? kColumn - line.size() : 1, ' ');
    line += option.help;
    if (!option.is_flag && !option.value.empty()) line += " [" + option.value + "]";
    lines += line + "\n";
  }
  return lines;
}

int64_t Arguments::integer(const std::string& name, int64_t least) const {
  const std::string& given = text(name);
  int64_t value = 0;
  const char* end = given.data() + given.size();
  const auto [stop, error] = std::from_chars(given.data(), end, value);
  if (error != std::errc() || stop != end || value < least) {
    throw UsageError("--" + name + " is '" + given + "'; an integer of at least " +
                     std::to_string(least) + " is accepted");
  }
  return value;
}

int Arguments::choice(const std::string& name, const std::vector<const char*>& accepted) const {
  const std::string& given = text(name);
  std::string list;
  int index = 0;
  for (const char* word : accepted) {
    if (given == word) return index;
    list += (index++ ? ", " : "") + std::string(word);
  }
  throw UsageError("--" + name + " is '" + given + "'; accepted are " + list);
}

const Option& Arguments::find(const std::string& name) const {
  for (const Option& option : options_) {
    if (name == option.name) return option;
  }
  throw UsageError("there is no option --" + name + "; --help lists them");
}

}  // namespace resnet_fused::driver
