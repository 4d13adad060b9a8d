//! Multiple-choice questions: a line of JSON each, and the tokens of every answer behind its question.
//!
//! Tokens are those of lm-evaluation-harness (`api/model.py`, `_encode_pair`, of August 2026): an answer follows its
//! question behind one space (its `target_delimiter`); white space at the question's end belongs to the answer; question
//! and answer are tokenized together, and what lies behind as many tokens as the question alone has is the answer's.

use std::io::Read as _;
use std::path::Path;

use mlx_quant_model::Tokenizer;
use serde::Deserialize;

use super::digest::hexadecimal;
use super::error::DataError;

/// The largest file of questions.
const LARGEST: u64 = 256 << 20;

/// A question with its answers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Question {
    /// What stands before an answer, as the model sees it.
    pub question: String,
    /// Answers, at least two.
    pub choices: Vec<String>,
    /// The right one, counted from 0.
    pub answer: usize,
    /// Its line in the file, counted from 1.
    #[serde(skip)]
    pub line: usize,
}

/// Questions of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suite {
    /// File name.
    pub name: String,
    /// SHA-256 of the file, lower-case hexadecimal.
    pub sha256: String,
    /// At least one, in the file's order.
    pub questions: Vec<Question>,
}

/// An answer behind its question, in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Index of its question.
    pub question: usize,
    /// The question's tokens and the answer's.
    pub tokens: Vec<u32>,
    /// How many of them are the question's; at least one, and fewer than all.
    pub given: usize,
}

impl Suite {
    /// Reads a `.jsonl` file: objects with `question`, `choices` and `answer` (other keys are left alone), empty lines
    /// between them.
    ///
    /// # Errors
    /// [`DataError::Question`] names the line; a file that cannot be read, or without questions.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let name =
            path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into());
        let unread = |error: std::io::Error| DataError::Suite(error.to_string());
        let file = fs_err::File::open(path).map_err(unread)?;
        if !file.metadata().map_err(unread)?.is_file() {
            return Err(DataError::Suite(format!("{} is not a plain file", path.display())));
        }
        let mut bytes = Vec::new();
        file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(unread)?;
        if bytes.len() as u64 > LARGEST {
            let reason = format!("more than {} MiB of questions", LARGEST >> 20);
            return Err(DataError::Question { file: path.display().to_string(), line: 1, reason });
        }
        Self::parse(name, &path.display().to_string(), &bytes)
    }

    /// The questions of a file called `name`, which lies at `file`.
    fn parse(name: String, file: &str, bytes: &[u8]) -> Result<Self, DataError> {
        let mut questions = Vec::new();
        for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            let line_number = index + 1;
            let wrong =
                |reason: String| DataError::Question { file: file.to_owned(), line: line_number, reason };
            let Ok(text) = std::str::from_utf8(line) else {
                return Err(DataError::Utf8 { file: file.to_owned(), line: line_number });
            };
            if text.trim().is_empty() {
                continue;
            }
            let mut question: Question =
                serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
            question.line = line_number;
            question.check().map_err(wrong)?;
            questions.push(question);
        }
        if questions.is_empty() {
            return Err(DataError::NoQuestions { file: file.to_owned() });
        }
        let sha256 = hexadecimal(&<sha2::Sha256 as sha2::Digest>::digest(bytes));
        Ok(Self { name, sha256, questions })
    }

    /// Every answer behind its question, by question, tokenized for a model.
    ///
    /// # Errors
    /// [`DataError::Question`] where an answer adds no token to its question or has more tokens than `longest`;
    /// [`DataError::Vocabulary`]; what the tokenizer does not take.
    pub fn tokens(
        &self,
        tokenizer: &Tokenizer,
        vocabulary: usize,
        longest: Option<usize>,
    ) -> Result<Vec<Choice>, DataError> {
        let mut all = Vec::new();
        for (index, question) in self.questions.iter().enumerate() {
            let place = || format!("line {}", question.line);
            let encode = |text: &str| {
                let ids = tokenizer.encode(text).map_err(|error| DataError::Tokenizer {
                    file: self.name.clone(),
                    place: place(),
                    error,
                })?;
                Ok::<Vec<u32>, DataError>([tokenizer.prefix(), &ids].concat())
            };
            let wrong =
                |reason: String| DataError::Question { file: self.name.clone(), line: question.line, reason };
            let given = encode(question.stem())?.len();
            for choice in &question.choices {
                let tokens = encode(&format!("{} {choice}", question.question))?;
                if tokens.len() <= given || given == 0 {
                    return Err(wrong(format!("the answer {choice:?} adds no token to the question")));
                }
                if let Some(longest) = longest.filter(|longest| tokens.len() > *longest) {
                    let tokens = tokens.len();
                    return Err(wrong(format!(
                        "question and answer have {tokens} tokens, the model sees {longest}"
                    )));
                }
                if let Some(id) = tokens.iter().copied().find(|id| *id as usize >= vocabulary) {
                    return Err(DataError::Vocabulary { file: self.name.clone(), id, vocabulary });
                }
                all.push(Choice { question: index, tokens, given });
            }
        }
        Ok(all)
    }
}

impl Question {
    fn check(&self) -> Result<(), String> {
        if self.stem().is_empty() {
            return Err("the question is empty".to_owned());
        }
        if self.choices.len() < 2 {
            return Err(format!("{} answers to choose from, a choice needs two", self.choices.len()));
        }
        if self.choices.iter().any(String::is_empty) {
            return Err("an answer is empty".to_owned());
        }
        if self.answer >= self.choices.len() {
            let (answer, count) = (self.answer, self.choices.len());
            return Err(format!("the right answer is number {answer} (counted from 0) of {count}"));
        }
        Ok(())
    }

    /// The question without the white space at its end, as Python's `rstrip` has it.
    fn stem(&self) -> &str {
        self.question.trim_end_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"question": "Q?", "choices": ["a", "b"], "answer": 1, "id": 7}"#;

    fn parse(text: &[u8]) -> Result<Suite, DataError> {
        Suite::parse("suite.jsonl".to_owned(), "folder/suite.jsonl", text)
    }

    #[test]
    fn lines_are_questions() {
        let suite = parse(format!("{GOOD}\r\n\n{GOOD}").as_bytes()).unwrap();
        assert_eq!(suite.questions.iter().map(|question| question.line).collect::<Vec<_>>(), [1, 3]);
        assert_eq!((suite.questions[1].answer, suite.questions[1].choices.len()), (1, 2));
    }

    #[test]
    fn a_bad_line_is_named() {
        let cases: [(&str, &str); 7] = [
            ("{", "EOF"),
            (r#"{"question": "Q?", "choices": ["a", "b"]}"#, "answer"),
            (r#"{"question": "Q?", "choices": ["a"], "answer": 0}"#, "1 answers to choose from"),
            (r#"{"question": "Q?", "choices": ["a", ""], "answer": 0}"#, "an answer is empty"),
            (r#"{"question": " \n", "choices": ["a", "b"], "answer": 0}"#, "the question is empty"),
            (r#"{"question": "Q?", "choices": ["a", "b"], "answer": 2}"#, "number 2 (counted from 0) of 2"),
            (r#"{"question": "Q?", "choices": ["a", "b"], "answer": -1}"#, "-1"),
        ];
        for (line, expected) in cases {
            let error = parse(format!("{GOOD}\n{line}\n").as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("folder/suite.jsonl, line 2: ") && error.contains(expected), "{error}");
            assert!(error.contains("; hint: "), "{error}");
        }
        assert!(matches!(parse(b"\n \n"), Err(DataError::NoQuestions { .. })));
        assert!(matches!(parse(b"\xff"), Err(DataError::Utf8 { line: 1, .. })));
    }
}
