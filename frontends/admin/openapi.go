package admin

import (
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"strings"
	"time"

	"sheepdog/frontends/admin/api"
)

// jsonObject is a JSON object of the description.
type jsonObject map[string]any

// describeAPI makes the OpenAPI description of the table of routes.
func describeAPI(version string) ([]byte, error) {
	d := &describer{schemas: jsonObject{}}
	d.schema(reflect.TypeFor[api.Error]())
	paths := jsonObject{}
	for _, r := range allRoutes() {
		path := strings.ReplaceAll(r.path, "...}", "}")
		item, ok := paths[path].(jsonObject)
		if !ok {
			item = jsonObject{}
			paths[path] = item
		}
		item[strings.ToLower(r.method)] = d.operation(&r)
	}
	return json.MarshalIndent(jsonObject{
		"openapi": "3.0.3",
		"info": jsonObject{
			"title": "Sheepdog", "version": version,
			"description": "Sizes and offsets are bytes, times RFC 3339 in UTC. A call that changes something must have the header " + api.ClientHeader +
				", or a body of type " + strings.Join([]string{api.TypeJSON, api.TypeBytes, api.TypeExtents}, ", ") + ".",
			"license": jsonObject{"name": "Apache-2.0"},
		},
		"paths":    paths,
		"security": []any{jsonObject{}, jsonObject{"token": []string{}}},
		"components": jsonObject{
			"schemas":         d.schemas,
			"securitySchemes": jsonObject{"token": jsonObject{"type": "http", "scheme": "bearer"}},
		},
	}, "", " ")
}

// describer collects the schemas of named types.
type describer struct{ schemas jsonObject }

var pathParam = regexp.MustCompile(`\{(\w+)`)

func (d *describer) operation(r *route) jsonObject {
	params := []any{}
	for _, m := range pathParam.FindAllStringSubmatch(r.path, -1) {
		params = append(params, jsonObject{"name": m[1], "in": "path", "required": true, "schema": jsonObject{"type": "string"}})
	}
	query := r.query
	if r.perNode {
		query = append([]param{paramNode}, query...)
	}
	for _, p := range query {
		s := jsonObject{"type": p.kind}
		if p.kind == "integer" {
			s["format"] = "int64"
		}
		params = append(params, jsonObject{"name": p.name, "in": "query", "description": p.what, "schema": s})
	}
	op := jsonObject{
		"summary":     r.summary,
		"operationId": operationID(r),
		"parameters":  params,
		"responses": jsonObject{
			fmt.Sprint(r.success()): d.success(r),
			"default":               jsonObject{"description": "It failed", "content": jsonObject{api.TypeJSON: jsonObject{"schema": ref("Error")}}},
		},
	}
	switch {
	case r.body != nil:
		op["requestBody"] = jsonObject{"required": true, "content": jsonObject{api.TypeJSON: jsonObject{"schema": d.schema(reflect.TypeOf(r.body))}}}
	case r.bodyType != "":
		op["requestBody"] = jsonObject{"required": true, "content": jsonObject{r.bodyType: jsonObject{"schema": anyBytes()}}}
	}
	return op
}

// operationID makes a name of a method and a path: getVdisNameSize.
func operationID(r *route) string {
	id := strings.ToLower(r.method)
	for _, part := range regexp.MustCompile(`\w+`).FindAllString(strings.TrimPrefix(r.path, api.Prefix), -1) {
		id += strings.ToUpper(part[:1]) + part[1:]
	}
	return id
}

func (d *describer) success(r *route) jsonObject {
	a := jsonObject{"description": "Done"}
	switch {
	case r.answer != nil:
		a["content"] = jsonObject{api.TypeJSON: jsonObject{"schema": d.schema(reflect.TypeOf(r.answer))}}
	case r.events != nil:
		a["description"] = "Begun: one JSON value a line; a last one with \"error\" says that it failed"
		a["content"] = jsonObject{api.TypeEvents: jsonObject{"schema": d.schema(reflect.TypeOf(r.events))}}
	case r.answerType != "":
		a["content"] = jsonObject{r.answerType: jsonObject{"schema": anyBytes()}}
	}
	return a
}

func anyBytes() jsonObject { return jsonObject{"type": "string", "format": "binary"} }

func ref(name string) jsonObject { return jsonObject{"$ref": "#/components/schemas/" + name} }

// schema describes a Go type as encoding/json writes it.
func (d *describer) schema(t reflect.Type) jsonObject {
	if t == reflect.TypeFor[time.Time]() {
		return jsonObject{"type": "string", "format": "date-time"}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return d.schema(t.Elem())
	case reflect.String:
		return jsonObject{"type": "string"}
	case reflect.Bool:
		return jsonObject{"type": "boolean"}
	case reflect.Float64:
		return jsonObject{"type": "number"}
	case reflect.Slice:
		return jsonObject{"type": "array", "items": d.schema(t.Elem())}
	case reflect.Map:
		return jsonObject{"type": "object", "additionalProperties": d.schema(t.Elem())}
	case reflect.Struct:
		return d.structure(t)
	}
	s := jsonObject{"type": "integer", "format": "int64"}
	if strings.HasPrefix(t.Kind().String(), "uint") {
		s["minimum"] = 0
	}
	return s
}

func (d *describer) structure(t reflect.Type) jsonObject {
	if _, known := d.schemas[t.Name()]; known {
		return ref(t.Name())
	}
	properties, required := jsonObject{}, []string{}
	d.schemas[t.Name()] = jsonObject{} // types may name themselves
	for f := range t.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "" || name == "-" {
			continue
		}
		properties[name] = d.schema(f.Type)
		if !strings.Contains(options, "omitempty") {
			required = append(required, name)
		}
	}
	s := jsonObject{"type": "object", "properties": properties}
	if len(required) > 0 {
		s["required"] = required
	}
	d.schemas[t.Name()] = s
	return ref(t.Name())
}
