//! Sampling flags, their bounds, and the defaults that a checkpoint brings along.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

use clap::Args;
use serde::Deserialize;
use tilert_mk_shared::sample::SamplingParams;

use crate::error::{Error, Result};

/// Temperature of a chat with a checkpoint that does not name one.
const CHAT_TEMPERATURE: f32 = 0.7;
/// Temperature of the built-in prompt: the demo model has learnt a random process, and always
/// taking the likeliest event would show none of it.
const DEMO_TEMPERATURE: f32 = 1.0;

#[derive(Args, Debug)]
pub(super) struct SamplingArgs {
    /// 0 takes the likeliest token [default: 0; in a chat what generation_config.json says, or
    /// 0.7; 1 for the built-in prompt of the demo model].
    #[arg(long, value_name = "T", allow_negative_numbers = true, value_parser = at_least_zero)]
    temperature: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all [default: 0].
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Keep the likeliest tokens whose probability adds up to P [default: 1].
    #[arg(long, value_name = "P", allow_negative_numbers = true,
          value_parser = fraction_above_zero)]
    top_p: Option<f32>,
    /// Keep tokens at least P times as likely as the likeliest [default: 0].
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = fraction)]
    min_p: Option<f32>,
    /// Seed of the random numbers [default: random; 0 at temperature 0].
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Divides the logits of tokens in prompt and answer; 1 changes nothing [default: 1].
    #[arg(long, value_name = "R", allow_negative_numbers = true, value_parser = above_zero)]
    repetition_penalty: Option<f32>,
    /// Subtracted from a token's logit for each time the answer has it [default: 0].
    #[arg(long, value_name = "F", allow_negative_numbers = true, value_parser = finite)]
    frequency_penalty: Option<f32>,
    /// Subtracted from a token's logit if the answer has it [default: 0].
    #[arg(long, value_name = "P", allow_negative_numbers = true, value_parser = finite)]
    presence_penalty: Option<f32>,
}

fn number(
    text: &str,
    is_allowed: impl Fn(f32) -> bool,
    wanted: &str,
) -> std::result::Result<f32, String> {
    let value = text.parse::<f32>().ok().filter(|value| value.is_finite() && is_allowed(*value));
    value.ok_or_else(|| format!("{wanted} is needed"))
}

fn at_least_zero(text: &str) -> std::result::Result<f32, String> {
    number(text, |value| value >= 0.0, "a number of 0 or more")
}

fn above_zero(text: &str) -> std::result::Result<f32, String> {
    number(text, |value| value > 0.0, "a number above 0")
}

fn fraction(text: &str) -> std::result::Result<f32, String> {
    number(text, |value| (0.0..=1.0).contains(&value), "a number from 0 to 1")
}

fn fraction_above_zero(text: &str) -> std::result::Result<f32, String> {
    number(text, |value| value > 0.0 && value <= 1.0, "a number above 0 and at most 1")
}

fn finite(text: &str) -> std::result::Result<f32, String> {
    number(text, |_| true, "a number")
}

/// What holds where no flag says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
pub(super) struct SamplingDefaults {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

impl SamplingDefaults {
    /// The likeliest token, always.
    pub(super) fn greedy() -> SamplingDefaults {
        SamplingDefaults::default()
    }

    /// Draws from the distribution that the demo model has learnt.
    pub(super) fn demo() -> SamplingDefaults {
        SamplingDefaults { temperature: Some(DEMO_TEMPERATURE), ..SamplingDefaults::default() }
    }

    /// What `generation_config.json` in `directory` recommends.
    pub(super) fn chat(directory: &Path) -> Result<SamplingDefaults> {
        let path = directory.join("generation_config.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => "{}".to_owned(),
            Err(error) => return Err(Error::file(path, error)),
        };
        let mut defaults: SamplingDefaults = serde_json::from_str(&text)
            .map_err(|error| Error::Tokenizer { path, message: error.to_string() })?;
        let otherwise = if defaults.do_sample == Some(false) { 0.0 } else { CHAT_TEMPERATURE };
        defaults.temperature = Some(defaults.temperature.unwrap_or(otherwise));
        Ok(defaults)
    }
}

impl SamplingArgs {
    /// The parameters of a request. A random seed is drawn anew by each call.
    pub(super) fn params(&self, defaults: &SamplingDefaults) -> SamplingParams {
        let base = SamplingParams::GREEDY;
        let temperature = self.temperature.or(defaults.temperature).unwrap_or(base.temperature);
        let default_seed = || {
            if temperature > 0.0 { random_seed() } else { base.seed }
        };
        let pick = |flag: Option<f32>, default: Option<f32>, base| flag.or(default).unwrap_or(base);
        SamplingParams {
            temperature,
            top_k: self.top_k.or(defaults.top_k).unwrap_or(base.top_k),
            top_p: pick(self.top_p, defaults.top_p, base.top_p),
            min_p: pick(self.min_p, defaults.min_p, base.min_p),
            repetition_penalty: pick(
                self.repetition_penalty,
                defaults.repetition_penalty,
                base.repetition_penalty,
            ),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            seed: self.seed.unwrap_or_else(default_seed),
            ..base
        }
    }
}

/// A seed that differs from run to run. It has 32 bits, so that every JSON reader keeps it exactly.
fn random_seed() -> u64 {
    // The standard library keys its hash maps with random numbers of the operating system.
    RandomState::new().build_hasher().finish() >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn flags(args: &[&str]) -> std::result::Result<SamplingArgs, clap::Error> {
        let args = std::iter::once("test").chain(args.iter().copied());
        Flags::try_parse_from(args).map(|flags| flags.sampling)
    }

    #[test]
    fn without_flags_it_is_greedy() {
        let params = flags(&[]).unwrap().params(&SamplingDefaults::greedy());
        assert_eq!(params, SamplingParams::GREEDY);
    }

    #[test]
    fn flags_win_over_the_checkpoint_and_the_checkpoint_over_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(SamplingDefaults::chat(dir.path()).unwrap().temperature, Some(0.7));
        let file = dir.path().join("generation_config.json");
        let text = r#"{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [1, 2]}"#;
        std::fs::write(&file, text).unwrap();
        let defaults = SamplingDefaults::chat(dir.path()).unwrap();
        let params = flags(&["--top-k", "5", "--seed", "7"]).unwrap().params(&defaults);
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.6, 0.95, 5));
        assert_eq!(params.seed, 7);
        std::fs::write(&file, r#"{"do_sample": false}"#).unwrap();
        assert_eq!(SamplingDefaults::chat(dir.path()).unwrap().temperature, Some(0.0));
        std::fs::write(&file, "[").unwrap();
        assert!(SamplingDefaults::chat(dir.path()).is_err());
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for bad in [
            ["--temperature", "-1"],
            ["--temperature", "NaN"],
            ["--top-p", "0"],
            ["--top-p", "1.5"],
            ["--min-p", "1.5"],
            ["--repetition-penalty", "0"],
            ["--frequency-penalty", "inf"],
        ] {
            assert!(flags(&bad).is_err(), "{bad:?}");
        }
        assert!(flags(&["--presence-penalty", "-0.5"]).is_ok());
    }

    #[test]
    fn seeds_are_drawn_only_when_they_matter() {
        let sampled = flags(&["--temperature", "1"]).unwrap();
        let seeds: Vec<u64> =
            (0..4).map(|_| sampled.params(&SamplingDefaults::greedy()).seed).collect();
        assert!(seeds.iter().any(|seed| *seed != seeds[0]), "{seeds:?}");
        assert!(seeds.iter().all(|seed| *seed <= u64::from(u32::MAX)));
    }
}
