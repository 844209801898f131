//! Text to tokens and back, over the `tokenizers` crate.
//!
//! `TextStream` turns tokens into text as they come. What it hands out, put together, equals the
//! text of all tokens decoded at once, and a character is handed out only when it is whole.
//! `StopMatcher` cuts that text at the first stop text and holds back what may become one.

use std::path::Path;

use tokenizers::Tokenizer as Inner;

use crate::error::{Error, Result};

/// Tokenizer of the embedded demo model.
const DEMO_TOKENIZER: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/model/demo/tokenizer.json"));

/// Encodes text to token ids and decodes ids to text.
pub struct Tokenizer {
    inner: Inner,
    /// The decoder joins `<0xNN>` tokens to characters, run by run.
    has_byte_fallback: bool,
}

impl Tokenizer {
    /// The tokenizer of the embedded demo model.
    pub fn demo() -> Result<Tokenizer> {
        Tokenizer::from_bytes(Path::new("embedded tokenizer.json"), DEMO_TOKENIZER)
    }

    /// Reads `tokenizer.json` in `directory`; none if there is no such file.
    pub fn load(directory: &Path) -> Result<Option<Tokenizer>> {
        let path = directory.join("tokenizer.json");
        match std::fs::read(&path) {
            Ok(bytes) => Tokenizer::from_bytes(&path, &bytes).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::file(path, error)),
        }
    }

    /// Parses the contents of a `tokenizer.json`; `path` names it in errors.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Tokenizer> {
        let tokenizer_error = |error: &dyn std::fmt::Display| Error::Tokenizer {
            path: path.to_owned(),
            message: one_line(&error.to_string()),
        };
        let mut inner = Inner::from_bytes(bytes).map_err(|error| tokenizer_error(&error))?;
        // Files may carry settings of a training run that would cut or pad a prompt in silence.
        inner.with_truncation(None).map_err(|error| tokenizer_error(&error))?;
        inner.with_padding(None);
        let decoder =
            serde_json::to_string(&inner.get_decoder()).map_err(|error| tokenizer_error(&error))?;
        Ok(Tokenizer { inner, has_byte_fallback: decoder.contains("\"ByteFallback\"") })
    }

    /// Token ids of `text`. With `add_special_tokens` the tokenizer adds what it puts around a
    /// text, such as a first token; a chat template has written that already.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        let encoding = encoding.map_err(|error| {
            Error::Request(format!(
                "the text cannot be tokenized: {}",
                one_line(&error.to_string())
            ))
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| {
            Error::Request(format!("tokens cannot be decoded: {}", one_line(&error.to_string())))
        })
    }

    /// A new stream, at the beginning of a text.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, window: Vec::new(), known_count: 0, known: String::new() }
    }

    fn kind(&self, id: u32) -> TokenKind {
        match self.inner.id_to_token(id) {
            None => TokenKind::Silent,
            Some(token) if self.inner.get_added_vocabulary().is_special_token(&token) => {
                TokenKind::Silent
            }
            Some(token) if self.has_byte_fallback && is_byte_token(&token) => TokenKind::Byte,
            Some(_) => TokenKind::Text,
        }
    }
}

/// What a token means to a stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TokenKind {
    /// Special or unknown: `decode` skips it.
    Silent,
    /// One byte of a character, whose decoding depends on the bytes around it.
    Byte,
    /// Anything else.
    Text,
}

/// Whether `token` has the form `<0x1F>`.
fn is_byte_token(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Decodes tokens as they come.
///
/// Decoders look at their neighbours (the first word loses its space, bytes join to characters), so
/// a token is decoded together with the tokens handed out just before it: `window[..known_count]`,
/// whose text is `known`. What the window's text has beyond `known` is new.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    window: Vec<u32>,
    known_count: usize,
    known: String,
}

impl TextStream<'_> {
    /// The text that became certain with token `id`; often empty in the middle of a character.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let kind = self.tokenizer.kind(id);
        if kind == TokenKind::Silent {
            return Ok(String::new());
        }
        self.window.push(id);
        // One invalid byte turns its whole run to replacement characters: wait for the run's end.
        if kind == TokenKind::Byte {
            return Ok(String::new());
        }
        let text = self.tokenizer.decode(&self.window)?;
        // A replacement character at the end may be the first bytes of a character.
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        let new = self.beyond_known(&text);
        self.window.drain(..self.known_count);
        self.known_count = self.window.len();
        self.known = self.tokenizer.decode(&self.window)?;
        Ok(new)
    }

    /// The rest of the text, when no more tokens come.
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window)?;
        Ok(self.beyond_known(&text))
    }

    fn beyond_known(&self, text: &str) -> String {
        text.strip_prefix(self.known.as_str()).unwrap_or_default().to_owned()
    }
}

/// Finds stop texts in text that comes in pieces.
///
/// The match that is complete first wins, the earlier start among those that end together, so the
/// result does not depend on how the text was cut into pieces.
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    is_matched: bool,
}

impl StopMatcher {
    /// A matcher at the beginning of a text; empty stop texts are ignored.
    pub fn new(stops: &[String]) -> StopMatcher {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        StopMatcher { stops, held: String::new(), is_matched: false }
    }

    /// Whether a stop text has been found. Text after it is dropped.
    pub fn is_matched(&self) -> bool {
        self.is_matched
    }

    /// Takes the next piece; returns the text that is certainly in front of any stop text.
    pub fn push(&mut self, piece: &str) -> String {
        if self.is_matched {
            return String::new();
        }
        self.held.push_str(piece);
        let matches = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        let certain_bytes = match matches.min() {
            Some((_, start)) => {
                self.is_matched = true;
                self.held.truncate(start);
                start
            }
            None => self.held.len() - self.possible_match_bytes(),
        };
        self.held.drain(..certain_bytes).collect()
    }

    /// The text still held back, when no more comes.
    pub fn finish(self) -> String {
        if self.is_matched { String::new() } else { self.held }
    }

    /// Length of the longest end of `held` with which a stop text begins.
    fn possible_match_bytes(&self) -> usize {
        let is_beginning = |end: &str| self.stops.iter().any(|stop| stop.starts_with(end));
        let starts = self.held.char_indices().map(|(start, _)| &self.held[start..]);
        let stop_bytes_max = self.stops.iter().map(String::len).max().unwrap_or(0);
        starts
            .filter(|end| end.len() < stop_bytes_max)
            .find(|end| is_beginning(end))
            .map_or(0, str::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use tilert_mk_shared::sample::random_bits;

    fn tokenizer(json: &Value) -> Tokenizer {
        Tokenizer::from_bytes(Path::new("test"), json.to_string().as_bytes()).unwrap()
    }

    fn with_parts(model: Value, decoder: Value, specials: &[(&str, u32)]) -> Tokenizer {
        let added: Vec<Value> = specials
            .iter()
            .map(|(content, id)| {
                json!({"id": id, "content": content, "special": true, "single_word": false,
                       "lstrip": false, "rstrip": false, "normalized": false})
            })
            .collect();
        tokenizer(&json!({"version": "1.0", "added_tokens": added, "normalizer": null,
                          "pre_tokenizer": null, "post_processor": null, "truncation": null,
                          "padding": null, "model": model, "decoder": decoder}))
    }

    fn vocab_of(tokens: &[String]) -> Value {
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect()
    }

    /// All 256 bytes by GPT-2's alphabet: printable Latin-1 stands for itself, others move up.
    fn byte_level() -> Tokenizer {
        let prints = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let mut moved = 256;
        let mut tokens: Vec<String> = Vec::new();
        for byte in 0..256 {
            let code = if prints(byte) { byte } else { moved };
            moved += u32::from(!prints(byte));
            tokens.push(char::from_u32(code).unwrap().to_string());
        }
        tokens.push("<end>".to_owned());
        let model = json!({"type": "BPE", "vocab": vocab_of(&tokens), "merges": []});
        let decoder = json!({"type": "ByteLevel", "add_prefix_space": false,
                             "trim_offsets": true, "use_regex": true});
        with_parts(model, decoder, &[("<end>", 256)])
    }

    /// Llama's SentencePiece form: 256 byte tokens, then words.
    fn sentence_piece(decoder: Value) -> Tokenizer {
        let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
        tokens.extend(["▁", "▁▁", "▁Hello", "wor", "ld", "é", "<s>"].map(str::to_owned));
        let model = json!({"type": "BPE", "vocab": vocab_of(&tokens), "merges": [],
                           "byte_fallback": true});
        with_parts(model, decoder, &[("<s>", 262)])
    }

    fn llama_decoder() -> Value {
        json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
    }

    fn word_level(decoder: Value) -> Tokenizer {
        let tokens = ["<unk>", "BID", " +1", "\n", "ü"].map(str::to_owned);
        let model = json!({"type": "WordLevel", "vocab": vocab_of(&tokens), "unk_token": "<unk>"});
        with_parts(model, decoder, &[("<unk>", 0)])
    }

    fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut stream = tokenizer.stream();
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    #[test]
    fn streams_equal_decoding_at_once() {
        let metaspace = json!({"type": "Sequence", "decoders": [{"type": "ByteFallback"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}]});
        let tokenizers = [
            (byte_level(), 258),
            (sentence_piece(llama_decoder()), 264),
            (sentence_piece(metaspace), 264),
            (word_level(json!({"type": "Fuse"})), 6),
            (word_level(Value::Null), 6),
        ];
        for (case, (tokenizer, id_count)) in tokenizers.iter().enumerate() {
            for seed in 0..200 {
                let id = |n| {
                    let bits = random_bits(seed, n);
                    // Every other token from the end of the vocabulary, where words are.
                    let back = (bits >> 32) as u32 % 8.min(id_count - 1) + 1;
                    if bits & 1 == 0 { bits as u32 / 2 % id_count } else { id_count - back }
                };
                let ids: Vec<u32> = (0..seed % 40).map(id).collect();
                let whole = tokenizer.decode(&ids).unwrap();
                assert_eq!(streamed(tokenizer, &ids).concat(), whole, "{case} {ids:?}");
            }
        }
    }

    #[test]
    fn characters_come_whole() {
        let text = "a é € 🦀 ÿ 漢字";
        let tokenizer = byte_level();
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        let pieces = streamed(&tokenizer, &ids);
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
        // The crab is four bytes: three silences, then all of it.
        let crab = text.find('🦀').unwrap();
        assert_eq!(pieces[crab..crab + 4], ["", "", "", "🦀"]);
    }

    #[test]
    fn bytes_after_words_come_whole() {
        let tokenizer = sentence_piece(llama_decoder());
        let pieces = streamed(&tokenizer, &[262, 258, 0xe2, 0x82, 0xac, 258, 262, 0xff]);
        assert_eq!(pieces, ["", "Hello", "", "", "", "€ Hello", "", "", "\u{fffd}"]);
    }

    #[test]
    fn special_tokens_do_not_swallow_a_space() {
        let tokenizer = sentence_piece(llama_decoder());
        assert_eq!(streamed(&tokenizer, &[258, 262, 258]).concat(), "Hello Hello");
    }

    #[test]
    fn settings_of_training_are_dropped() {
        let mut json = json!({"version": "1.0", "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst",
                           "stride": 0},
            "padding": null, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}});
        assert_eq!(tokenizer(&json).encode("a a a a", true).unwrap(), [0; 4]);
        json["model"] = Value::Null;
        let bytes = json.to_string();
        let Err(error) = Tokenizer::from_bytes(Path::new("dir/x"), bytes.as_bytes()) else {
            panic!("a tokenizer without a model was accepted");
        };
        let message = error.to_string();
        assert!(message.starts_with("dir/x: ") && !message.contains('\n'), "{message}");
    }

    fn stopped(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut matcher = StopMatcher::new(&stops);
        let mut out: Vec<String> = pieces.iter().map(|piece| matcher.push(piece)).collect();
        let is_matched = matcher.is_matched();
        out.push(matcher.finish());
        (out, is_matched)
    }

    #[test]
    fn text_before_a_stop_is_kept_and_a_beginning_is_held() {
        let (out, is_matched) = stopped(&["END"], &["one E", "N", "E", "EN", "D two", " three"]);
        assert_eq!(out, ["one ", "", "EN", "E", "", "", ""]);
        assert!(is_matched);
        let (out, is_matched) = stopped(&["END"], &["a EN"]);
        assert_eq!((out.concat(), is_matched), ("a EN".to_owned(), false));
    }

    #[test]
    fn cutting_into_pieces_does_not_matter() {
        let text = "xaabaaabcé€abcaab";
        for stops in [&["aab"][..], &["aabc", "aaab"], &["b", "aaab"], &["é€", "€"], &["zz"], &[]]
        {
            let whole = stopped(stops, &[text]);
            let each: Vec<String> = text.chars().map(String::from).collect();
            let each: Vec<&str> = each.iter().map(String::as_str).collect();
            let parts = stopped(stops, &each);
            assert_eq!((whole.0.concat(), whole.1), (parts.0.concat(), parts.1), "{stops:?}");
        }
    }
}
