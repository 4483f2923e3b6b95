// Command-line options: a table of names with help and defaults, and typed access to their values.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace resnet_fused::driver {

// The command line asks for something that there is not; the message says what is accepted.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Option {
  const char* name;      // without the dashes
  std::string value;     // the default; what was given, after parse
  std::string help;      // one line
  bool is_flag = false;  // takes no value: "" is off, "1" is on
};

class Arguments {
 public:
  explicit Arguments(std::vector<Option> options) : options_(std::move(options)) {}

  // Reads "--name value", "--name=value" and "--flag". Throws UsageError for anything else.
  void parse(int count, const char* const* words);

  // One line an option: name, help, default.
  std::string help() const;

  const std::string& text(const std::string& name) const { return find(name).value; }
  bool flag(const std::string& name) const { return !find(name).value.empty(); }
  // A decimal integer, at least `least`.
  int64_t integer(const std::string& name, int64_t least) const;
  // One of `accepted`: its index.
  int choice(const std::string& name, const std::vector<const char*>& accepted) const;

 private:
  const Option& find(const std::string& name) const;

  std::vector<Option> options_;
};

}  // namespace resnet_fused::driver
