#include "evaluation/tasks.hpp"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <set>
#include <stdexcept>

namespace evaluation {
namespace {

using Words = std::vector<std::pair<std::string, std::string>>;

/// "{name}" and the like replaced by words.
std::string fill(std::string text, const Words& words) {
  for (const auto& [key, word] : words) {
    const std::string mark = "{" + key + "}";
    for (std::size_t i = text.find(mark); i != std::string::npos; i = text.find(mark, i + word.size())) {
      text.replace(i, mark.size(), word);
    }
  }
  return text;
}

/// A statement and where in the text it goes, 0 to 1.
struct Placed {
  double place;
  std::string line;
};

/// Puts each statement on a line of its own, at the line end next to its place.
std::string insert(const std::string& filler, std::vector<Placed> statements) {
  std::stable_sort(statements.begin(), statements.end(),
                   [](const Placed& a, const Placed& b) { return a.place < b.place; });
  constexpr std::size_t kReach = 160;  // bytes: no line of a book is longer
  std::string out;
  std::size_t done = 0;
  for (const Placed& statement : statements) {
    auto cut = static_cast<std::size_t>(statement.place * static_cast<double>(filler.size()));
    const std::size_t line_end = filler.find('\n', cut);
    if (line_end != std::string::npos && line_end < cut + kReach) cut = line_end + 1;
    cut = std::max(cut, done);
    out.append(filler, done, cut - done);
    done = cut;
    if (!out.empty() && out.back() != '\n') out += '\n';
    out += statement.line + "\n";
  }
  out.append(filler, done);
  if (!out.empty() && out.back() != '\n') out += '\n';
  return out;
}

}  // namespace

/// Choices from a seed. The standard's distributions differ between platforms; these do not.
class TaskMaker::Draw {
 public:
  Draw(const nlohmann::json& spec, std::uint64_t seed) : spec_(spec), random_(seed) {}

  std::size_t below(std::size_t n) { return static_cast<std::size_t>(random_() % n); }
  double unit() { return static_cast<double>(random_() >> 11) * 0x1p-53; }
  const nlohmann::json& pick(const nlohmann::json& list) { return list.at(below(list.size())); }
  std::string text(const nlohmann::json& list, const Words& words) {
    return fill(pick(list).get<std::string>(), words);
  }

  std::string value() {
    const auto& digits = spec_.at("value_digits");
    const auto least = digits.at("min").get<std::size_t>(), most = digits.at("max").get<std::size_t>();
    std::string number(1, static_cast<char>('1' + below(9)));
    for (std::size_t n = least + below(most - least + 1); number.size() < n;) {
      number += static_cast<char>('0' + below(10));
    }
    return number;
  }

  std::string name() {
    const auto& made = spec_.at("made_name");
    for (;;) {
      std::string name;
      if (unit() < made.at("share").get<double>()) {
        const auto least = made.at("parts_min").get<std::size_t>(), most = made.at("parts_max").get<std::size_t>();
        for (std::size_t n = least + below(most - least + 1); n > 0; --n) {
          name += pick(spec_.at("syllables")).get<std::string>();
        }
        name.front() = static_cast<char>(std::toupper(static_cast<unsigned char>(name.front())));
      } else {
        name = pick(spec_.at("names")).get<std::string>();
      }
      if (taken_.insert(name).second) return name;
    }
  }

 private:
  const nlohmann::json& spec_;
  std::mt19937_64 random_;
  std::set<std::string> taken_;
};

TaskMaker::TaskMaker(const std::filesystem::path& templates) {
  std::ifstream in(templates);
  if (!in) throw std::runtime_error(templates.string() + ": cannot be opened");
  spec_ = nlohmann::json::parse(in, nullptr, false);
  if (!spec_.is_object() || !spec_.contains("tasks") || !spec_["tasks"].is_object()) {
    throw std::runtime_error(templates.string() + ": has no tasks");
  }
}

std::vector<std::string> TaskMaker::names() const {
  std::vector<std::string> names;
  for (const auto& [name, task] : spec_["tasks"].items()) names.push_back(name);
  return names;
}

TaskCase TaskMaker::make(const std::string& name, const Text& text, std::size_t length, double depth,
                         std::uint64_t seed) const {
  if (!spec_["tasks"].contains(name)) throw std::runtime_error("unknown task " + name);
  const auto& task = spec_["tasks"][name];
  Draw draw(spec_, seed);
  const auto& form =
      draw.pick((task.contains("forms_of") ? spec_["tasks"][task["forms_of"].get<std::string>()] : task).at("forms"));
  Words words{{"noun", draw.pick(spec_.at("nouns")).get<std::string>()}, {"name", draw.name()}};
  std::vector<Placed> statements;
  constexpr double kEnd = 0.98;  // the last statement does not touch the question
  if (form.contains("statements")) {
    words.emplace_back("value", draw.value());
    statements.push_back({depth * kEnd, draw.text(form["statements"], words)});
    if (task.contains("names_min")) {
      const auto least = task["names_min"].get<std::size_t>(), most = task["names_max"].get<std::size_t>();
      for (std::size_t others = least + draw.below(most - least + 1) - 1; others > 0; --others) {
        const Words other{words[0], {"name", draw.name()}, {"value", draw.value()}};
        statements.push_back({draw.unit() * kEnd, draw.text(form["statements"], other)});
      }
    }
  } else {
    words.insert(words.end(),
                 {{"other", draw.name()}, {"value", draw.value()}, {"value1", draw.value()}, {"value2", draw.value()}});
    statements.push_back({depth * kEnd, draw.text(form.at("first"), words)});
    statements.push_back({(depth + (1.0 - depth) * draw.unit()) * kEnd, draw.text(form.at("second"), words)});
  }
  const auto& question = draw.pick(form.at("questions"));
  TaskCase made{name, depth, length, {}, fill(question.at("ask"), words), fill(question.at("answer"), words)};

  std::size_t used = made.question.size() + statements.size() + 1;  // line breaks that may be added
  for (const Placed& statement : statements) used += statement.line.size() + 1;
  if (used >= length || text.tokens.size() < length) {
    throw std::runtime_error("task " + name + " does not fit in " + std::to_string(length) + " bytes of " + text.name);
  }
  const std::size_t size = length - used, start = draw.below(text.tokens.size() - size + 1);
  std::string filler;
  for (std::size_t i = 0; i < size; ++i) filler += static_cast<char>(text.tokens[start + i]);
  made.context = insert(filler, std::move(statements));
  return made;
}

std::vector<TaskCase> make_cases(const TaskSuite& suite, std::span<const Text> texts, std::uint64_t seed) {
  const TaskMaker maker(suite.templates);
  std::vector<TaskCase> cases;
  for (const std::string& task : suite.names) {
    std::uint64_t mix = seed;  // so that tasks do not share their names and numbers
    for (const char c : task) mix = (mix ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    for (const std::size_t length : suite.lengths) {
      for (const double depth : suite.depths) {
        for (std::size_t i = 0; i < suite.cases; ++i) {
          const auto cell = static_cast<std::uint64_t>(depth * 1000.0) * 1000003u + length * 10007u + i;
          cases.push_back(maker.make(task, texts[i % texts.size()], length, depth, mix * 0x9e3779b97f4a7c15u + cell));
        }
      }
    }
  }
  return cases;
}

TokenCase byte_case(const TaskCase& text) {
  const auto bytes = [](const std::string& from) {
    std::vector<decoder::Token> tokens;
    for (const char c : from) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
  };
  return {text.task, text.depth, text.length, bytes(text.context), bytes(text.question), bytes(text.answer)};
}

void write_cases(const std::filesystem::path& file, std::span<const TaskCase> cases) {
  auto list = nlohmann::json::array();
  for (const TaskCase& c : cases) {
    list.push_back({{"task", c.task},
                    {"depth", c.depth},
                    {"length", c.length},
                    {"context", c.context},
                    {"question", c.question},
                    {"answer", c.answer}});
  }
  std::ofstream out(file);
  out << nlohmann::json{{"format", "kvfold-cases-1"}, {"cases", list}}.dump(1) << "\n";
  if (!out.flush()) throw std::runtime_error(file.string() + ": cannot be written");
}

std::vector<TokenCase> read_cases(const std::filesystem::path& file, const Vocabulary& vocabulary) {
  std::ifstream in(file);
  if (!in) throw std::runtime_error(file.string() + ": cannot be opened");
  const auto json = nlohmann::json::parse(in, nullptr, false);
  if (!json.is_object() || json.value("format", "") != "kvfold-token-cases-1" || !json.contains("cases")) {
    throw std::runtime_error(file.string() + ": has no cases in tokens; make one with tools/prepare_smollm2 tasks");
  }
  std::vector<TokenCase> cases;
  try {
    for (const auto& each : json["cases"]) {
      cases.push_back({each.at("task"), each.at("depth"), each.at("length"), each.at("context"), each.at("question"),
                       each.at("answer")});
    }
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(file.string() + ": " + error.what());
  }
  for (const TokenCase& c : cases) {
    if (c.context.empty() || c.question.empty() || c.answer.empty()) {
      throw std::runtime_error(file.string() + ": a case has no context, question or answer");
    }
    for (const auto* part : {&c.context, &c.question, &c.answer}) {
      for (const decoder::Token token : *part) {
        if (token < 0 || token >= vocabulary.size)
          throw std::runtime_error(file.string() + ": has tokens of another model");
      }
    }
  }
  return cases;
}

}  // namespace evaluation
