// One JSON object, in the order of its fields.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

namespace resnet_fused::driver {

class Json {
 public:
  void add(const char* name, const std::string& value) {
    std::string quoted = "\"";
    for (const char c : value) {
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += c == '\n' ? ' ' : c;
    }
    put(name, quoted + "\"");
  }
  void add(const char* name, const char* value) { add(name, std::string(value)); }
  void add(const char* name, int64_t value) { put(name, std::to_string(value)); }
  void add(const char* name, int value) { put(name, std::to_string(value)); }
  void add(const char* name, bool value) { put(name, value ? "true" : "false"); }
  void add(const char* name, const Json& object) { put(name, object.text()); }
  // A number with 6 digits; JSON has no infinity and no NaN, which are null.
  void add(const char* name, double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", value);
    put(name, value - value == 0 ? text : "null");
  }

  std::string text() const { return "{" + fields_ + "}"; }

 private:
  void put(const char* name, const std::string& value) {
    fields_.append(fields_.empty() ? "\"" : ", \"").append(name).append("\": ").append(value);
  }

  std::string fields_;
};

}  // namespace resnet_fused::driver
