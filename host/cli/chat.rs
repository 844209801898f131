//! An interactive session: a chat where the checkpoint has a chat template, otherwise raw prompts,
//! one a line.
//!
//! Ctrl-C stops the answer that is being written; at the prompt, or when the answer does not stop,
//! it leaves. The handler runs on a thread of its own and only touches the two flags below.

use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::launch::{LaunchArgs, answer_room};
use super::output::{Answer, Output, Run};
use super::sampling::SamplingDefaults;
use super::{print_error, status};
use crate::chat_template::{ChatTemplate, Message};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// An answer is being written.
static IS_ANSWERING: AtomicBool = AtomicBool::new(false);
/// The answer that is being written should stop.
static CANCEL: AtomicBool = AtomicBool::new(false);

/// What a session needs for every turn.
struct Session<'a> {
    args: &'a LaunchArgs,
    tokenizer: &'a Tokenizer,
    engine: Engine,
    stop_ids: Vec<u32>,
    defaults: SamplingDefaults,
    output: Output,
}

/// Talks until the input ends.
pub(super) fn run(args: &LaunchArgs, directory: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let template = ChatTemplate::load(directory)?;
    let defaults = match template {
        Some(_) => SamplingDefaults::chat(directory)?,
        None => SamplingDefaults::greedy(),
    };
    let engine = args.open()?;
    ctrlc::set_handler(on_interrupt)
        .map_err(|error| Error::Device(format!("Ctrl-C cannot be handled: {error}")))?;
    let stop_ids = args.stop_ids(&engine);
    let output = Output::new();
    let mut session = Session { args, tokenizer, engine, stop_ids, defaults, output };
    match &template {
        Some(template) => {
            status("Chat: an empty line changes nothing, Ctrl-C stops an answer, Ctrl-D leaves.");
            session.chat(template)
        }
        None => {
            status("No chat template: each line is a prompt of its own, Ctrl-D leaves.");
            session.raw_prompts()
        }
    }
}

fn on_interrupt() {
    let is_first = !CANCEL.swap(true, Ordering::Relaxed);
    if IS_ANSWERING.load(Ordering::Relaxed) && is_first {
        return;
    }
    status("");
    // The terminal may be in the middle of a read that nothing else ends.
    std::process::exit(0);
}

/// The next line that is not empty; none at the end of the input.
fn next_line() -> Result<Option<String>> {
    let stdin_error = |error| Error::file("stdin", error);
    loop {
        let _ = io::stderr().write_all(b"> ");
        let mut line = String::new();
        if io::stdin().read_line(&mut line).map_err(stdin_error)? == 0 {
            status("");
            return Ok(None);
        }
        let line = line.trim_end_matches(['\r', '\n']);
        if !line.trim().is_empty() {
            return Ok(Some(line.to_owned()));
        }
    }
}

/// Prints an error that concerns one request only; the session goes on.
fn report_request<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error @ (Error::Request(_) | Error::Tokenizer { .. })) => {
            print_error(&error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Session<'_> {
    fn chat(&mut self, template: &ChatTemplate) -> Result<()> {
        let mut messages: Vec<Message> = Vec::new();
        while let Some(line) = next_line()? {
            messages.push(Message::new("user", line));
            let answer = self
                .fitting_prompt(template, &mut messages)
                .and_then(|prompt| self.answer(&prompt));
            match report_request(answer)? {
                Some(answer) => messages.push(Message::new("assistant", answer.text)),
                None => drop(messages.pop()),
            }
            if self.output.is_closed() {
                break;
            }
        }
        Ok(())
    }

    fn raw_prompts(&mut self) -> Result<()> {
        while let Some(line) = next_line()? {
            let answer = self.tokenizer.encode(&line, true).and_then(|ids| self.answer(&ids));
            let _ = report_request(answer)?;
            if self.output.is_closed() {
                break;
            }
        }
        Ok(())
    }

    /// The prompt of the conversation. Where it does not fit the context, as few of its oldest
    /// turns as possible are forgotten.
    fn fitting_prompt(
        &self,
        template: &ChatTemplate,
        messages: &mut Vec<Message>,
    ) -> Result<Vec<u32>> {
        let mut forgotten_count = 0;
        loop {
            // The template has written the special tokens.
            let text = template.render(&messages[forgotten_count..])?;
            let prompt = self.tokenizer.encode(&text, false)?;
            match answer_room(&self.engine, &prompt) {
                // A turn is a question and its answer; the newest question stays.
                Err(_) if messages.len() - forgotten_count > 2 => forgotten_count += 2,
                Err(error) => return Err(error),
                Ok(_) => {
                    if forgotten_count > 0 {
                        let turn_count = forgotten_count / 2;
                        status(&format!("(the context is full: {turn_count} turns forgotten)"));
                    }
                    messages.drain(..forgotten_count);
                    return Ok(prompt);
                }
            }
        }
    }

    fn answer(&mut self, prompt: &[u32]) -> Result<Answer> {
        let room = answer_room(&self.engine, prompt)?;
        let sampling = self.args.sampling.params(&self.defaults);
        let run = Run {
            prompt,
            max_tokens: self.args.max_tokens.unwrap_or(room).min(room),
            stop_ids: &self.stop_ids,
            stops: &self.args.stop,
            sampling,
            tokenizer: Some(self.tokenizer),
            logits: None,
            cancel: Some(&CANCEL),
        };
        CANCEL.store(false, Ordering::Relaxed);
        IS_ANSWERING.store(true, Ordering::Relaxed);
        let output = &mut self.output;
        let answer = run.generate(&mut self.engine, &mut |text| output.write(text));
        IS_ANSWERING.store(false, Ordering::Relaxed);
        self.output.end_line()?;
        let answer = answer?;
        status(&answer.status_line(&self.engine, prompt, &sampling));
        Ok(answer)
    }
}
