//! The admin API's document (OpenAPI 3.1), and a check of what a daemon really answers against it.
//!
//! The check is for tests. It knows the keywords that the document uses, takes an unknown keyword for an error, and is
//! stricter than OpenAPI in one thing: a property that the document does not name is an error, unless the schema has
//! `additionalProperties`. A client must bear further properties, as they may be added; the document must name them.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::AdminClient;

/// `docs/openapi.json`.
pub const DOCUMENT: &str = include_str!("../../../docs/openapi.json");
/// The extension that names the daemons which serve an operation.
const DAEMONS: &str = "x-daemons";
/// Keywords that say nothing about a value.
const REMARKS: [&str; 5] = ["title", "description", "examples", "default", "format"];

/// The document, read.
#[derive(Debug)]
pub struct Document(Value);

impl Document {
    /// The one that is shipped.
    ///
    /// # Panics
    /// When it is not JSON.
    pub fn shipped() -> Self {
        Self(serde_json::from_str(DOCUMENT).expect("docs/openapi.json is JSON"))
    }

    /// Method and path of each operation that a daemon serves.
    pub fn routes(&self, daemon: &str) -> BTreeSet<(String, String)> {
        let mut routes = BTreeSet::new();
        for (path, operations) in object(&self.0["paths"]) {
            for (method, operation) in object(operations) {
                let daemons = operation[DAEMONS].as_array().into_iter().flatten();
                if daemons.clone().any(|name| name == daemon) {
                    routes.insert((method.to_uppercase(), path.clone()));
                }
            }
        }
        routes
    }

    /// Names of the parameters of an operation that a daemon takes.
    pub fn parameters(&self, daemon: &str, method: &str, path: &str) -> BTreeSet<String> {
        let parameters = self.operation(method, path)["parameters"].as_array();
        let of_daemon = |parameter: &&Value| {
            let daemons = parameter[DAEMONS].as_array();
            daemons.is_none_or(|names| names.iter().any(|name| name == daemon))
        };
        let name = |parameter: &Value| parameter["name"].as_str().unwrap_or_default().to_owned();
        parameters
            .into_iter()
            .flatten()
            .filter(of_daemon)
            .map(name)
            .collect()
    }

    /// Checks an answer with this status against the schema that the document has for it.
    ///
    /// # Errors
    /// Where the answer and the document differ.
    pub fn check(&self, method: &str, path: &str, status: u16, answer: &Value) -> Result<(), String> {
        let response = &self.operation(method, path)["responses"][status.to_string()];
        let response = self.resolve(response)?;
        let schema = &response["content"]["application/json"]["schema"];
        if schema.is_null() {
            return Err(format!(
                "{method} {path}: no JSON of status {status} is in the document"
            ));
        }
        self.value(schema, answer, "")
            .map_err(|problem| format!("{method} {path}, {status}: {problem}"))
    }

    /// Asks a running daemon for everything that the document knows, without giving an order: each of its operations answers as
    /// the document says and takes the parameters that it names and no other; those of other daemons are not there.
    ///
    /// # Errors
    /// The first difference.
    pub async fn compare_with(&self, daemon: &str, client: &AdminClient) -> Result<(), String> {
        let own = self.routes(daemon);
        for (method, path) in self.all_routes() {
            // Text, which takes no parameters and minds none.
            if !path.starts_with("/v1/") {
                continue;
            }
            // No operation takes it, so none is carried out.
            let odd = format!("{path}?no-such-parameter=1");
            let asked = client.ask_with_status(&method, &odd).await;
            let (status, answer) = asked.map_err(|error| format!("{method} {path}: {error}"))?;
            if !own.contains(&(method.clone(), path.clone())) {
                if status != 404 && status != 405 {
                    return Err(format!(
                        "{method} {path} is served with {status}, and not in the document"
                    ));
                }
                continue;
            }
            if self.operation(&method, &path)["responses"]["400"].is_null() {
                continue;
            }
            self.check(&method, &path, status, &answer)?;
            let taken = names_in(answer["error"].as_str().unwrap_or_default());
            let named = self.parameters(daemon, &method, &path);
            if status != 400 || taken != named {
                return Err(format!(
                    "{method} {path} takes {taken:?}, the document says {named:?}"
                ));
            }
            if method == "GET" {
                let asked = client.ask_with_status(&method, &path).await;
                let (status, answer) = asked.map_err(|error| format!("{method} {path}: {error}"))?;
                self.check(&method, &path, status, &answer)?;
            }
        }
        Ok(())
    }

    fn all_routes(&self) -> BTreeSet<(String, String)> {
        let all = ["replicator", "backup-agent", "witness"];
        all.iter().flat_map(|daemon| self.routes(daemon)).collect()
    }

    fn operation(&self, method: &str, path: &str) -> &Value {
        &self.0["paths"][path][method.to_lowercase()]
    }

    fn resolve<'a>(&'a self, value: &'a Value) -> Result<&'a Value, String> {
        let Some(reference) = value["$ref"].as_str() else {
            return Ok(value);
        };
        let pointer = reference.strip_prefix('#').unwrap_or(reference);
        self.0
            .pointer(pointer)
            .ok_or_else(|| format!("the document has no {reference}"))
    }

    fn value(&self, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
        let schema = self.resolve(schema)?;
        for (keyword, wanted) in object(schema) {
            match keyword.as_str() {
                "type" => check_type(wanted, value, at)?,
                "properties" => self.properties(schema, wanted, value, at)?,
                "required" => check_required(wanted, value, at)?,
                "items" => {
                    for (number, item) in value.as_array().into_iter().flatten().enumerate() {
                        self.value(wanted, item, &format!("{at}/{number}"))?;
                    }
                }
                "enum" if !array(wanted).contains(value) => {
                    return Err(format!("{at}: {value} is none of {wanted}"));
                }
                "const" if wanted != value => return Err(format!("{at}: {value} is not {wanted}")),
                "oneOf" => self.one_of(array(wanted), value, at)?,
                "additionalProperties" if !schema["properties"].is_object() => {
                    for (name, member) in object(value) {
                        self.value(wanted, member, &format!("{at}/{name}"))?;
                    }
                }
                "enum" | "const" | "additionalProperties" => {}
                remark if REMARKS.contains(&remark) => {}
                other => return Err(format!("{at}: the check does not know the keyword {other}")),
            }
        }
        Ok(())
    }

    fn properties(&self, schema: &Value, known: &Value, value: &Value, at: &str) -> Result<(), String> {
        for (name, member) in object(value) {
            let at = format!("{at}/{name}");
            match (known.get(name), schema.get("additionalProperties")) {
                (Some(schema), _) | (None, Some(schema)) => self.value(schema, member, &at)?,
                (None, None) => return Err(format!("{at} is not in the document")),
            }
        }
        Ok(())
    }

    fn one_of(&self, schemas: &[Value], value: &Value, at: &str) -> Result<(), String> {
        let results: Vec<_> = schemas
            .iter()
            .map(|schema| self.value(schema, value, at))
            .collect();
        match results.iter().filter(|result| result.is_ok()).count() {
            1 => Ok(()),
            0 => {
                let problems: Vec<_> = results.into_iter().filter_map(Result::err).collect();
                Err(format!("{at}: fits none: {}", problems.join("; ")))
            }
            fits => Err(format!("{at}: fits {fits} schemas at once")),
        }
    }
}

/// The parameters that the refusal of an unknown one names: what stands in backquotes after "expected".
fn names_in(refusal: &str) -> BTreeSet<String> {
    let (_, known) = refusal.split_once("expected").unwrap_or_default();
    known.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn object(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn check_type(wanted: &Value, value: &Value, at: &str) -> Result<(), String> {
    let fits = |name: &Value| match name.as_str() {
        Some("null") => value.is_null(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("number") => value.is_number(),
        Some("string") => value.is_string(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => false,
    };
    let fit = match wanted {
        Value::Array(names) => names.iter().any(fits),
        name => fits(name),
    };
    if fit {
        return Ok(());
    }
    Err(format!("{at}: {value} is not of type {wanted}"))
}

fn check_required(wanted: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Some(members) = value.as_object() else {
        return Ok(());
    };
    for name in array(wanted) {
        if !members.contains_key(name.as_str().unwrap_or_default()) {
            return Err(format!("{at}: {name} is missing"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(schema: Value, value: &Value) -> Result<(), String> {
        let response = json!({"content": {"application/json": {"schema": schema}}});
        let operation = json!({"get": {"responses": {"200": response}}});
        let document = json!({"paths": {"/x": operation}, "components": {"A": {"type": "string"}}});
        Document(document).check("GET", "/x", 200, value)
    }

    #[test]
    fn what_the_document_does_not_say_is_an_error() {
        let schema = json!({"type": "object", "required": ["a"], "properties": {
            "a": {"$ref": "#/components/A"},
            "b": {"type": ["array", "null"], "items": {"enum": [1, 2]}},
            "c": {"oneOf": [{"const": 1}, {"type": "boolean"}]},
        }});
        let good = [
            json!({"a": "x"}),
            json!({"a": "x", "b": null, "c": true}),
            json!({"a": "x", "b": [1, 2]}),
        ];
        for value in good {
            assert_eq!(check(schema.clone(), &value), Ok(()), "{value}");
        }
        for (value, problem) in [
            (json!({}), "\"a\" is missing"),
            (json!({"a": 1}), "/a: 1 is not of type"),
            (json!({"a": "x", "d": 1}), "/d is not in the document"),
            (json!({"a": "x", "b": [1, 3]}), "/b/1: 3 is none of"),
            (json!({"a": "x", "c": 2}), "/c: fits none"),
            (json!([]), "is not of type"),
        ] {
            let error = check(schema.clone(), &value).unwrap_err();
            assert!(error.contains(problem), "{value}: {error}");
        }
        assert!(
            check(json!({"minimum": 3}), &json!(1))
                .unwrap_err()
                .contains("does not know")
        );
        assert!(check(json!({"$ref": "#/nothing"}), &json!(1)).is_err());
    }

    #[test]
    fn the_shipped_document_names_its_operations_and_their_daemons() {
        let document = Document::shipped();
        assert_eq!(document.0["openapi"], "3.1.0");
        for (path, operations) in object(&document.0["paths"]) {
            for (method, operation) in object(operations) {
                assert!(!array(&operation[DAEMONS]).is_empty(), "{method} {path}");
                assert!(operation["summary"].is_string(), "{method} {path}");
            }
        }
        assert!(
            document
                .routes("witness")
                .contains(&("POST".into(), "/v1/forget".into()))
        );
    }
}
