//! `tilert-mk launch`: one prompt and its answer, or a chat on a terminal.
//!
//! Everything that can be wrong with the command line, the prompt or an output path is found before
//! the weights are loaded.

use std::io::{self, IsTerminal, Read};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tilert_mk_shared::limits::STEP_TOKENS_MAX;

use super::output::{Output, Run};
use super::sampling::{SamplingArgs, SamplingDefaults};
use super::{ModelArgs, chat, status};
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::logits_file::LogitsFile;
use crate::tokenizer::Tokenizer;
use crate::trace_file::TraceFile;

/// Tokens of an answer, unless a flag says otherwise.
const MAX_TOKENS: u32 = 256;
/// Steps that a trace keeps.
const TRACE_STEPS: u32 = 16;
/// The longest prompt that is read.
const PROMPT_BYTES_MAX: u64 = 16 << 20;
/// How long the demo model waits for a prompt on a silent stdin before it takes its own.
const STDIN_WAIT: Duration = Duration::from_millis(200);
/// Two lines of the tape that the embedded demo model has learnt.
const DEMO_PROMPT: &str = "BID +1 x200 5ms\nTRADE ASK +2 x100 2ms\n";

const EXAMPLES: &str = "\
Examples:
  tilert-mk launch
  tilert-mk launch --model DIR
  tilert-mk launch --model DIR --prompt 'Once upon a time' --temperature 0.8 --seed 1
  tilert-mk launch --model DIR --prompt-ids 1,2,3 --max-tokens 16 --format json
  echo 'def fib(n):' | tilert-mk launch --model DIR --stop 'def '
  tilert-mk launch --model DIR --devices 2 --prompt-file FILE
  tilert-mk launch --model DIR --prompt-file FILE --trace trace.json

Without a prompt flag the prompt is stdin. When stdin is a terminal, --model DIR starts a chat with
the model's chat template, or takes each line as a prompt if there is no template. Without --model
and without a prompt the demo model continues a built-in prompt. Prompts are taken as they are; only
a chat applies the template.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(super) struct LaunchArgs {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    /// Tokens to generate at most [default: 256; in a chat what the context has room for].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) max_tokens: Option<u32>,
    #[command(flatten)]
    pub(super) sampling: SamplingArgs,
    /// End the answer before this text; may be given several times.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = stop_text)]
    pub(super) stop: Vec<String>,
    /// Go on after the model's end-of-text tokens.
    #[arg(long)]
    pub(super) ignore_eos: bool,
    /// Prompt tokens that one step processes.
    #[arg(long, value_name = "N", default_value_t = STEP_TOKENS_MAX,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(STEP_TOKENS_MAX)))]
    prefill_chunk: u32,
    /// Print the text as it comes, or one JSON object at the end.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// Write the logits of every processed position as safetensors.
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    /// Write the tasks of the last steps as a Chrome/Perfetto trace.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[group(multiple = false)]
struct PromptArgs {
    /// The prompt.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// A file with the prompt.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// The prompt as token ids, with commas between; needs no tokenizer.
    #[arg(long, value_name = "IDS", value_parser = token_ids)]
    prompt_ids: Option<TokenIds>,
}

#[derive(Clone, Debug)]
struct TokenIds(Vec<u32>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

fn token_ids(text: &str) -> std::result::Result<TokenIds, String> {
    let parse = |id: &str| id.trim().parse().map_err(|_| format!("'{id}' is not a token id"));
    text.split(',').map(parse).collect::<std::result::Result<_, _>>().map(TokenIds)
}

fn stop_text(text: &str) -> std::result::Result<String, String> {
    if text.is_empty() { Err("the text is empty".to_owned()) } else { Ok(text.to_owned()) }
}

/// Where the prompt comes from, with what was read of it.
enum Prompt {
    Ids(Vec<u32>),
    Text(String),
    /// The built-in prompt of the demo model.
    Demo,
    /// A person types.
    Terminal,
}

impl PromptArgs {
    fn read(&self, is_embedded: bool) -> Result<Prompt> {
        let non_empty = |text: String, from: &str| {
            if text.is_empty() {
                return Err(Error::Request(format!("empty prompt ({from})")));
            }
            Ok(Prompt::Text(text))
        };
        if let Some(TokenIds(ids)) = &self.prompt_ids {
            return Ok(Prompt::Ids(ids.clone()));
        }
        if let Some(text) = &self.prompt {
            return non_empty(text.clone(), "--prompt");
        }
        if let Some(path) = &self.prompt_file {
            let file = std::fs::File::open(path).map_err(|error| Error::file(path, error))?;
            return non_empty(
                read_prompt(file, path)?,
                &format!("--prompt-file {}", path.display()),
            );
        }
        match (io::stdin().is_terminal(), is_embedded) {
            (true, true) => Ok(Prompt::Demo),
            (true, false) => Ok(Prompt::Terminal),
            (false, true) => Ok(read_stdin_if_any()?.map_or(Prompt::Demo, Prompt::Text)),
            (false, false) => non_empty(read_prompt(io::stdin(), Path::new("stdin"))?, "stdin"),
        }
    }
}

/// All of `source`, which must be UTF-8 of bounded length; `path` names it in errors.
fn read_prompt(source: impl Read, path: &Path) -> Result<String> {
    let mut text = String::new();
    let read = source.take(PROMPT_BYTES_MAX + 1).read_to_string(&mut text);
    let byte_count = read.map_err(|error| Error::file(path, error))?;
    if byte_count as u64 > PROMPT_BYTES_MAX {
        let path = path.display();
        return Err(Error::Request(format!(
            "{path}: a prompt has at most {PROMPT_BYTES_MAX} bytes"
        )));
    }
    Ok(text)
}

/// The prompt on stdin; none if it is empty, or open and silent as under many a process manager.
fn read_stdin_if_any() -> Result<Option<String>> {
    let (first_sender, first_receiver) = mpsc::channel();
    let (rest_sender, rest_receiver) = mpsc::channel();
    // A read cannot be given up; the thread ends with the process.
    std::thread::spawn(move || {
        let mut first = [0u8; 1];
        let read = io::stdin().read(&mut first);
        let is_some = !matches!(read, Ok(0));
        // Nobody listens any more once the wait is over.
        let _ = first_sender.send(is_some);
        let rest = match read {
            Ok(count) => read_prompt((&first[..count]).chain(io::stdin()), Path::new("stdin")),
            Err(error) => Err(Error::file("stdin", error)),
        };
        let _ = rest_sender.send(rest);
    });
    match first_receiver.recv_timeout(STDIN_WAIT) {
        Ok(true) => {
            let gone = || Error::Request("stdin: reading stopped".to_owned());
            rest_receiver.recv().map_err(|_| gone())?.map(Some)
        }
        Ok(false) | Err(_) => Ok(None),
    }
}

/// Runs the subcommand.
pub(super) fn run(args: &LaunchArgs) -> Result<()> {
    let directory = args.model.directory();
    let prompt = args.prompt.read(directory.is_none())?;
    if matches!(prompt, Prompt::Terminal) {
        args.check_terminal()?;
    }
    let mut logits = args.logits.as_deref().map(LogitsFile::create).transpose()?;
    let trace = args.trace.as_deref().map(TraceFile::create).transpose()?;
    let tokenizer = directory.map_or_else(|| Tokenizer::demo().map(Some), Tokenizer::load)?;
    let needed = || tokenizer.as_ref().ok_or_else(|| args.missing_tokenizer());
    if !args.stop.is_empty() {
        let _ = needed()?;
    }
    let (ids, defaults) = match (prompt, directory) {
        (Prompt::Ids(ids), _) => (ids, SamplingDefaults::greedy()),
        (Prompt::Text(text), _) => (needed()?.encode(&text, true)?, SamplingDefaults::greedy()),
        (Prompt::Terminal, Some(directory)) => return chat::run(args, directory, needed()?),
        (Prompt::Demo | Prompt::Terminal, _) => {
            (needed()?.encode(DEMO_PROMPT, true)?, SamplingDefaults::demo())
        }
    };
    if ids.is_empty() {
        return Err(Error::Request("empty prompt (it has no tokens)".to_owned()));
    }

    let mut engine = args.open()?;
    let max_tokens = args.max_tokens.unwrap_or(MAX_TOKENS).min(answer_room(&engine, &ids)?);
    let run = Run {
        prompt: &ids,
        max_tokens,
        stop_ids: &args.stop_ids(&engine),
        stops: &args.stop,
        sampling: args.sampling.params(&defaults),
        tokenizer: tokenizer.as_ref(),
        logits: logits.as_mut(),
        cancel: None,
    };
    args.answer(&mut engine, run)?;
    if let Some(file) = logits {
        file.finish()?;
    }
    if let Some(file) = trace {
        let names = engine.program().names.clone();
        let name = |task_idx: u32| names.get(task_idx as usize).cloned().unwrap_or_default();
        file.write(&engine.into_trace()?, &name)?;
    }
    Ok(())
}

/// Tokens that fit the context after `prompt`, at least one.
pub(super) fn answer_room(engine: &Engine, prompt: &[u32]) -> Result<u32> {
    let vocab_size = engine.config().vocab_size;
    if let Some(id) = prompt.iter().find(|id| **id >= vocab_size) {
        return Err(Error::Request(format!(
            "token id {id} of the prompt is out of range: the vocabulary has {vocab_size} entries"
        )));
    }
    let context_max = engine.context_max();
    let prompt_count = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
    match context_max.saturating_sub(prompt_count) {
        0 => Err(Error::Request(format!(
            "the prompt has {} tokens, which leaves no room in a context of {context_max} \
             (see --max-context)",
            prompt.len()
        ))),
        room => Ok(room),
    }
}

impl LaunchArgs {
    /// Loads the model as the flags say.
    pub(super) fn open(&self) -> Result<Engine> {
        self.model.open(&EngineOptions {
            step_tokens: self.prefill_chunk,
            trace_steps: if self.trace.is_some() { TRACE_STEPS } else { 0 },
            ..self.model.engine_options()
        })
    }

    /// The tokens that end an answer.
    pub(super) fn stop_ids(&self, engine: &Engine) -> Vec<u32> {
        if self.ignore_eos { Vec::new() } else { engine.config().eos_ids.clone() }
    }

    fn check_terminal(&self) -> Result<()> {
        let flags = [
            ("--format json", self.format == Format::Json),
            ("--logits", self.logits.is_some()),
            ("--trace", self.trace.is_some()),
        ];
        match flags.iter().find(|(_, is_given)| *is_given) {
            Some((flag, _)) => Err(Error::Usage(format!("{flag} needs a prompt"))),
            None => Ok(()),
        }
    }

    fn missing_tokenizer(&self) -> Error {
        let directory = self.model.directory().unwrap_or(Path::new("."));
        let message = "not found, and text needs it (--prompt-ids without --stop does not)";
        Error::Tokenizer { path: directory.join("tokenizer.json"), message: message.to_owned() }
    }

    fn answer(&self, engine: &mut Engine, run: Run<'_>) -> Result<()> {
        let (prompt, sampling) = (run.prompt, run.sampling);
        let mut output = Output::new();
        if self.format == Format::Json {
            let answer = run.generate(engine, &mut |_| Ok(ControlFlow::Continue(())))?;
            let _ = output.write(&answer.to_json(engine, prompt, sampling.seed)?)?;
            return Ok(());
        }
        let generated = run.generate(engine, &mut |text| output.write(text));
        output.end_line()?;
        let answer = generated?;
        if !output.is_closed() {
            status(&answer.status_line(engine, prompt, &sampling));
        }
        Ok(())
    }
}
