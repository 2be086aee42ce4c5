# Asks SmolLM2 about a short document, from a compressed cache, and makes each mistake once. Needs PROGRAM and DIRECTORY.
if("$ENV{KVFOLD_SMOLLM2_GGUF}" STREQUAL "")
  message("skipped: KVFOLD_SMOLLM2_GGUF does not name a file (tools/prepare_smollm2 gguf --weights f32)")
  return()
endif()
set(model "$ENV{KVFOLD_SMOLLM2_GGUF}")
file(MAKE_DIRECTORY "${DIRECTORY}")
set(story "${DIRECTORY}/story.txt")
set(sentence "The wind blew over the hills, and the old woman walked slowly along the road to the village. ")
string(REPEAT "${sentence}" 8 before)
string(REPEAT "${sentence}" 4 after)
file(WRITE "${story}" "${before}The name of her dog was Barnaby. ${after}")
set(question --question "What was the name of her dog?" --threads 1 --max-answer 16)

# The output must match each expression.
function(expect_answer name arguments)
  execute_process(COMMAND "${PROGRAM}" --model "${model}" --document "${story}" ${arguments} ${question}
    RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  if(NOT code EQUAL 0 OR NOT errors STREQUAL "")
    message(SEND_ERROR "${name}: exit code ${code}\n${output}${errors}")
  endif()
  foreach(expression IN LISTS ARGN)
    if(NOT output MATCHES "${expression}")
      message(SEND_ERROR "${name}: no '${expression}' in\n${output}")
    endif()
  endforeach()
endfunction()

# Exit code 1, nothing on stdout, and one line that says what is wrong.
function(expect_error message)
  execute_process(COMMAND "${PROGRAM}" ${ARGN} RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  if(NOT code EQUAL 1 OR NOT output STREQUAL "" OR NOT errors MATCHES "^kvfold-llama-chat: [^\n]*\n$"
     OR NOT errors MATCHES "${message}")
    message(SEND_ERROR "${ARGN}: '${message}' expected; exit code ${code}\n${output}${errors}")
  endif()
endfunction()

expect_answer(aware "--context;512;--method;ems;--budget;96;--aware;--compare"
  "rows per head +[0-9]+ -> 96\n" "\nfull cache: [^\n]*Barnaby" "\ncompressed: [^\n]*Barnaby")
expect_answer(quantised "--context;512;--budget;112;--queries;all;--cache-type-k;q8_0;--cache-type-v;q8_0"
  "rows per head +[0-9]+ -> 112\n" "\n> What was the name of her dog.\n[^\n]*Barnaby")
expect_answer(conversation "--context;512;--method;full;--conversation;--question;What blew over the hills?"
  ", to its end\n" "\n> What blew over the hills.\n[^\n]*wind" "\n> What was the name of her dog.\n[^\n]*Barnaby")
expect_answer(cut "--context;256;--offset;7;--method;streaming-llm;--budget;32"
  ": bytes 7 to [0-9]+ of [0-9]+, as much as fits\n" "rows per head +[0-9]+ -> 32\n")

set(blank "${DIRECTORY}/blank.txt")
file(WRITE "${blank}" " \n")
expect_error("--model is required" --document "${story}")
expect_error("--model: File does not exist" --model "${DIRECTORY}/none.gguf" --document "${story}")
expect_error("story.txt: is not a GGUF file" --model "${story}" --document "${story}")
file(WRITE "${DIRECTORY}/broken.gguf" "GGUF and no more")
expect_error("broken.gguf: llama.cpp cannot load it: " --model "${DIRECTORY}/broken.gguf" --document "${story}")
expect_error("--document: File does not exist" --model "${model}" --document "${DIRECTORY}/none.txt")
expect_error("blank.txt: no text there" --model "${model}" --document "${blank}")
expect_error("story.txt: no text there" --model "${model}" --document "${story}" --offset 1000000)
expect_error("--budget" --model "${model}" --document "${story}" --budget 0)
expect_error("--method" --model "${model}" --document "${story}" --method best)
expect_error("--method full" --model "${model}" --document "${story}" --method full --aware)
expect_error("--context: the model reads 8192 tokens" --model "${model}" --document "${story}" --context 9000)
expect_error("--context: no room" --model "${model}" --document "${story}" --context 64)
expect_error("V cache" --model "${model}" --document "${story}" --cache-type-v q8_0 --flash-attention off)
